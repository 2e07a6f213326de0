"""The way of averages into Composer's checkpoints, and out of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from composer.core import State
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ema_dist.composer import monolithic
from ema_dist.composer.sharded import ATTRIBUTE, Loading, Path
from ema_dist.ema import ShardedEMA
from ema_dist.messages import apart
from ema_dist.sharding import cpu_copy

Make = Callable[[nn.Module], ShardedEMA]
"""Makes new averages of a model."""

KINDS = ("averages", "buffers")


class Checkpoints:
    """The checkpoints of one State.

    Monolithic ones hold full tensors in the algorithm's part, sharded ones tensors as DCP cuts them, in an attribute of
    State that this adds. Either holds the averages; but while these are in the model, the live weights, and of the
    averages only what the model cannot hold as it is, having weights of another dtype.

    Args:
        before_save: called each time that Composer collects the model's weights.
    """

    def __init__(self, state: State, before_save: Callable[[], None]) -> None:
        self._state = state
        self._model_state = state.get_model_state_dict
        # No event tells of an explicit save, and this is what each asks for the model's weights.
        state.get_model_state_dict = partial(_after, before_save, self._model_state)
        self._loading: Loading | None = None
        self._part: Mapping[str, Any] | None = None
        self.lacks_averages = False
        if ATTRIBUTE not in state.serialized_attributes:
            state.serialized_attributes.append(ATTRIBUTE)
        self.forget()

    @property
    def is_sharded(self) -> bool:
        """Whether each rank writes its part."""
        return self._state.fsdp_sharded_state_dict_enabled

    @property
    def is_loading(self) -> bool:
        """Whether Composer, when it asks for a state, wants to read into it."""
        return self._loading is not None

    def before_load(self) -> None:
        """Composer may load a checkpoint now."""
        if self.is_sharded:
            self._loading = Loading(self._state)

    def after_load(self, make: Make) -> ShardedEMA | None:
        """The averages of the checkpoint that Composer has loaded, if there are some; the model has its live weights.

        Collective: over all ranks.
        Memory: with sharded checkpoints, two sets of averages and a copy of the live weights.
        Raises: ValueError for a checkpoint of another model.
        """
        found = self._loading.end() if self._loading is not None else set()
        read = getattr(self._state, ATTRIBUTE)
        part, self._part, self._loading = self._part, None, None
        self.forget()
        if part is not None and not part.get("ema_started", True):
            return None
        if part is not None and "ema_model" in part:
            return self._from_monolithic(part, make)
        if part is not None and found:
            return self._from_sharded(part, read, found, make)
        self.lacks_averages = self._state.timestamp.batch > 0
        return None

    def note(self, part: Mapping[str, Any]) -> None:
        """Keep the algorithm's part of a checkpoint until `after_load`."""
        self._part = part

    def forget(self) -> None:
        """Let go of the tensors that were to be written."""
        setattr(self._state, ATTRIBUTE, None)

    def lay_out(self, make: Make) -> None:
        """Provide what there is to read into, from a checkpoint that may hold all of it, or some, or nothing.

        Collective: over all ranks. Memory: the averages, and a copy of the live weights.
        """
        assert self._loading is not None
        self._loading.require_own_planner()
        setattr(self._state, ATTRIBUTE, {"ema": make(self._state.model).state_dict(), "live": self.copied_model()})

    def write(self, ema: ShardedEMA, live: Mapping[str, Any] | None) -> dict[str, Any]:
        """The algorithm's part of a checkpoint.

        Args:
            live: what `copied_model` returned, while the averages are in the model.

        Collective: over all ranks.
        """
        if not self.is_sharded:
            prefix = monolithic.WRAPPED if self._state.is_model_ddp else ""
            return monolithic.write(ema, live, prefix=prefix)
        state = ema.state_dict()
        averaged = [name for kind in KINDS for name in state["tracks"]["default"][kind]]
        if live is None:
            setattr(self._state, ATTRIBUTE, {"ema": state})
        else:
            track = state["tracks"]["default"]
            for kind in KINDS:
                track[kind] = {name: it for name, it in track[kind].items() if it.dtype != live[name].dtype}
            setattr(self._state, ATTRIBUTE, {"ema": state, "live": live})
        return {"averaged": averaged}

    def copied_model(self) -> dict[str, Any]:
        """A copy of the model's state as Composer saves it, on the CPU; empty where this rank has nothing to write.

        Collective: over all ranks.
        """
        state = self._model_state()
        if not self.is_sharded and dist.get_global_rank() != 0:
            return {}
        return {name: cpu_copy(it) if isinstance(it, Tensor) else copy.deepcopy(it) for name, it in state.items()}

    def _from_monolithic(self, part: Mapping[str, Any], make: Make) -> ShardedEMA:
        model = self._state.model
        ema = make(model)
        state = ema.state_dict()
        saved = monolithic.read(
            part,
            averaged=[name for kind in KINDS for name in state["tracks"]["default"][kind]],
            known=ema.full_shapes(),
            parameters=[name for name, _ in model.named_parameters()],
            buffers=[name for name, _ in model.named_buffers()],
        )
        ema.load_state_dict(state | {"steps": saved.steps, "updates": saved.updates})
        if saved.averages:
            ema.load_full_state_dict(saved.averages)
        if saved.live:
            self._set_model(saved.live)
        return ema

    def _from_sharded(
        self, part: Mapping[str, Any], read: Mapping[str, Any], stored: set[Path], make: Make
    ) -> ShardedEMA:
        is_active = part["ema_weights_active"]
        ema = make(self._state.model)
        state = ema.state_dict() | {count: read["ema"][count] for count in ("format", "steps", "updates")}
        lost: set[str] = set()
        names: set[str] = set()
        for kind in KINDS:
            tensors = state["tracks"]["default"][kind]
            found = {name for name in tensors if ("ema", "tracks", "default", kind, name) in stored}
            names |= tensors.keys()
            lost |= set() if is_active else tensors.keys() - found
            tensors |= {name: read["ema"]["tracks"]["default"][kind][name] for name in found}
        names_of_live = {path[1] for path in stored if path[0] == "live"}  # DCP takes extra states of modules apart
        live = {name: it for name, it in read["live"].items() if name in names_of_live or not isinstance(it, Tensor)}
        lost |= read["live"].keys() - live.keys() if is_active else set()
        saved = {*part["averaged"]}
        if different := apart("the model", lost | (names - saved), "the checkpoint", saved - names):
            raise ValueError(f"the checkpoint holds the averages of another model: {different}")
        ema.load_state_dict(state)
        if is_active:
            self._set_model(live)
        return ema

    def _set_model(self, live: Mapping[str, Any]) -> None:
        options = StateDictOptions(
            full_state_dict=self._state.fsdp_state_dict_type == "full",
            cpu_offload=self._state.fsdp_enabled,
            strict=False,
        )
        set_model_state_dict(self._state.model, dict(live), options=options)


def _after(first: Callable[[], None], then: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    first()
    return then()
