"""Saves the averages in Composer's checkpoints, and restores them after Composer has loaded one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from composer.core import State
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ema_dist.composer import monolithic, sharded
from ema_dist.composer.sharded import ATTRIBUTE, KINDS, KeyPath, PlannerOverride
from ema_dist.ema import ShardedEMA
from ema_dist.sharding import cpu_copy

AveragesFactory = Callable[[nn.Module], ShardedEMA]
"""Constructs averages of a model."""


class CheckpointHandler:
    """Saves and restores the averages in the checkpoints of one State.

    Monolithic checkpoints hold full tensors in the algorithm's part. Sharded checkpoints hold tensors for DCP, in an
    attribute that is added to State. These tensors are the averages. While the averages are swapped in, they are in
    the checkpoint already, as the model's weights. The handler then saves the live weights instead, and the averages
    only if the model rounds them because its weights have a different dtype.

    Args:
        before_save: called each time Composer collects the model's weights.
    """

    def __init__(self, state: State, before_save: Callable[[], None]) -> None:
        self._state = state
        self._get_model_state = state.get_model_state_dict
        # Composer has no event for an explicit save, but every save calls this method.
        state.get_model_state_dict = partial(_call_after, before_save, self._get_model_state)
        self._planner_override: PlannerOverride | None = None
        self._saved_part: Mapping[str, Any] | None = None
        self.lacks_averages: bool = False
        if ATTRIBUTE not in state.serialized_attributes:
            state.serialized_attributes.append(ATTRIBUTE)
        self.release()

    @property
    def is_sharded(self) -> bool:
        """Whether checkpoints are sharded: each rank writes its part."""
        return self._state.fsdp_sharded_state_dict_enabled

    @property
    def is_loading(self) -> bool:
        """Whether Composer is loading: it then calls `EMA.state_dict` for the tensors to read into."""
        return self._planner_override is not None

    def before_load(self) -> None:
        """Prepare for the checkpoint that Composer may load now."""
        if self.is_sharded:
            self._planner_override = PlannerOverride(self._state)

    def after_load(self, make_averages: AveragesFactory) -> ShardedEMA | None:
        """Return the averages of the checkpoint that Composer has loaded, if any, and load live weights into the model.

        Collective: over all ranks.
        Memory: with sharded checkpoints, two sets of averages and a copy of the live weights.
        Raises: ValueError if the checkpoint was saved from a different model.
        """
        found_paths = self._planner_override.restore_config() if self._planner_override is not None else set()
        loaded = getattr(self._state, ATTRIBUTE)
        algorithm_state, self._saved_part, self._planner_override = self._saved_part, None, None
        self.release()
        if algorithm_state is not None and not algorithm_state.get("ema_started", True):
            return None
        if algorithm_state is not None and "ema_model" in algorithm_state:
            return self._from_monolithic(algorithm_state, make_averages)
        if algorithm_state is not None and found_paths:
            return self._from_sharded(algorithm_state, loaded, found_paths, make_averages)
        self.lacks_averages = self._state.timestamp.batch > 0
        return None

    def keep_state(self, algorithm_state: Mapping[str, Any]) -> None:
        """Keep the algorithm's part of a checkpoint until `after_load`."""
        self._saved_part = algorithm_state

    def release(self) -> None:
        """Release the tensors that were added to State for a checkpoint."""
        setattr(self._state, ATTRIBUTE, None)

    def allocate_targets(self, make_averages: AveragesFactory) -> None:
        """Add to State the tensors to read into; the checkpoint may hold all, some or none of them.

        Collective: over all ranks. Memory: the averages, and a copy of the live weights.
        """
        assert self._planner_override is not None
        self._planner_override.require_own_planner()
        setattr(
            self._state,
            ATTRIBUTE,
            {"ema": make_averages(self._state.model).state_dict(), "live": self.copy_model_state()},
        )

    def make_state(self, ema: ShardedEMA, live: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the algorithm's part of a checkpoint, and add the tensors of a sharded one to State.

        Args:
            live: the result of `copy_model_state`, while the averages are swapped in; else None.

        Collective: over all ranks.
        """
        if not self.is_sharded:
            prefix = monolithic.DDP_PREFIX if self._state.is_model_ddp else ""
            return monolithic.make_state(ema, live, prefix=prefix)
        algorithm_state, tensors = sharded.make_state(ema, live)
        setattr(self._state, ATTRIBUTE, tensors)
        return algorithm_state

    def copy_model_state(self) -> dict[str, Any]:
        """Return a CPU copy of the model's state as Composer saves it; empty on ranks that write nothing.

        Collective: over all ranks.
        """
        state = self._get_model_state()
        if not self.is_sharded and dist.get_global_rank() != 0:
            return {}
        return {
            name: cpu_copy(value) if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in state.items()
        }

    def _from_monolithic(self, algorithm_state: Mapping[str, Any], make_averages: AveragesFactory) -> ShardedEMA:
        model = self._state.model
        ema = make_averages(model)
        state = ema.state_dict()
        saved = monolithic.parse_state(
            algorithm_state,
            averaged_names=[name for kind in KINDS for name in state["tracks"]["default"][kind]],
            known_names=ema.full_shapes(),
            parameters=[name for name, _ in model.named_parameters()],
            buffers=[name for name, _ in model.named_buffers()],
        )
        ema.load_state_dict(state | {"steps": saved.steps, "updates": saved.updates})
        if saved.averages:
            ema.load_full_state_dict(saved.averages)
        if saved.live:
            self._load_live_weights(saved.live)
        return ema

    def _from_sharded(
        self,
        algorithm_state: Mapping[str, Any],
        loaded: Mapping[str, Any],
        found_paths: set[KeyPath],
        make_averages: AveragesFactory,
    ) -> ShardedEMA:
        ema = make_averages(self._state.model)
        saved = sharded.parse_state(algorithm_state, loaded, found_paths=found_paths, initial=ema.state_dict())
        ema.load_state_dict(saved.ema)
        if saved.live:
            self._load_live_weights(saved.live)
        return ema

    def _load_live_weights(self, live: Mapping[str, Any]) -> None:
        options = StateDictOptions(
            full_state_dict=self._state.fsdp_state_dict_type == "full",
            cpu_offload=self._state.fsdp_enabled,
            strict=False,
        )
        set_model_state_dict(self._state.model, dict(live), options=options)


def _call_after(first: Callable[[], None], then: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    first()
    return then()
