"""Averages in Composer's sharded checkpoints, as an attribute of Composer's State: DCP saves and reshards its tensors.

The result of `Algorithm.state_dict` cannot hold them: DCP saves it as one opaque object, so that every rank would load
the first rank's shard.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from composer.core import State
from composer.utils import FSDP2Config
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from ema_dist.ema import ShardedEMA
from ema_dist.messages import describe_difference

ATTRIBUTE = "ema_dist"
"""The attribute of State that holds this package's part of a sharded checkpoint, before a save or after a load."""

ATTRIBUTE_PATH = ("state", ATTRIBUTE)

KINDS = ("averages", "buffers")
"""The keys of a track's tensors in the state of `ShardedEMA`."""

# Repeats `ema_dist.checkpoint.values.KeyPath`: that package needs an extra, which this one does not.
KeyPath: TypeAlias = tuple[str | int, ...]
"""The keys that lead to a value in nested dictionaries."""


@dataclass(frozen=True)
class ShardedState:
    """The contents of a sharded checkpoint.

    Args:
        ema: the state for `ShardedEMA.load_state_dict`. Averages that only the checkpoint's model holds have their
            initial values in it.
        live: the live weights, if the checkpoint's model holds the averages; else empty.
    """

    ema: Mapping[str, Any]
    live: Mapping[str, Any]


def make_state(ema: ShardedEMA, live: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the algorithm's part of a checkpoint, and the value of `ATTRIBUTE`.

    Args:
        live: the live weights, while the averages are swapped in; else None.

    Collective: over all ranks.
    """
    state = ema.state_dict()
    track = state["tracks"]["default"]
    algorithm_state = {"averaged": [name for kind in KINDS for name in track[kind]]}
    if live is None:
        return algorithm_state, {"ema": state}
    for kind in KINDS:
        track[kind] = {name: tensor for name, tensor in track[kind].items() if tensor.dtype != live[name].dtype}
    return algorithm_state, {"ema": state, "live": live}


def parse_state(
    algorithm_state: Mapping[str, Any],
    loaded: Mapping[str, Any],
    *,
    found_paths: set[KeyPath],
    initial: Mapping[str, Any],
) -> ShardedState:
    """Parse the two parts of a checkpoint, as `make_state` returns them.

    Args:
        loaded: the value of `ATTRIBUTE`; the load has not changed the values that the checkpoint lacks.
        found_paths: the paths below `ATTRIBUTE` that the checkpoint has.
        initial: the state of newly constructed averages; those in the checkpoint replace them.

    Raises: ValueError when the checkpoint was saved from another model.
    """
    is_active = algorithm_state["ema_weights_active"]
    state = {**initial, **{key: loaded["ema"][key] for key in ("format", "steps", "updates")}}
    missing: set[str] = set()
    expected_names: set[str] = set()
    for kind in KINDS:
        tensors = state["tracks"]["default"][kind]
        found_names = {name for name in tensors if ("ema", "tracks", "default", kind, name) in found_paths}
        expected_names |= tensors.keys()
        missing |= set() if is_active else tensors.keys() - found_names
        tensors |= {name: loaded["ema"]["tracks"]["default"][kind][name] for name in found_names}
    live_names = {path[1] for path in found_paths if path[0] == "live"}  # DCP flattens extra states
    live = {
        name: value for name, value in loaded["live"].items() if name in live_names or not isinstance(value, Tensor)
    }
    missing |= loaded["live"].keys() - live.keys() if is_active else set()
    saved_names = {*algorithm_state["averaged"]}
    if difference := describe_difference(
        "the model", missing | (expected_names - saved_names), "the checkpoint", saved_names - expected_names
    ):
        raise ValueError(f"the checkpoint holds averages of another model: {difference}")
    return ShardedState(state, live if is_active else {})


class PlannerOverride:
    """Puts a `PartialLoadPlanner` into the FSDP configuration while Composer may load a sharded checkpoint.

    Composer collects all tensors to read into before it opens the checkpoint, and DCP raises if the checkpoint lacks
    one. But not every checkpoint holds averages, so the planner skips the tensors of this package that are missing.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._planner = PartialLoadPlanner()
        self._user_config: Any = state.fsdp_config
        config = copy.copy(self._user_config)
        if isinstance(config, FSDP2Config):
            config.__class__ = _ConfigWithPlanner  # FSDP2Config has no attribute for a planner
        config.load_planner = self._planner
        state.fsdp_config = config

    def require_own_planner(self) -> None:
        """Raise ValueError if the user has chosen another planner."""
        if self._user_config.load_planner is not None:
            raise ValueError(
                f"expected no load_planner in the FSDP configuration, found {self._user_config.load_planner!r}: EMA "
                "needs a planner of its own, because some checkpoints hold no averages; remove load_planner, or load "
                "without EMA"
            )

    def restore_config(self) -> set[KeyPath]:
        """Put the user's configuration back; return the paths below `ATTRIBUTE` that the checkpoint had."""
        self._state.fsdp_config = self._user_config
        return self._planner.found_paths


class PartialLoadPlanner(DefaultLoadPlanner):
    """Reads all requested entries, except those below `ATTRIBUTE` that the checkpoint lacks.

    `found_paths` has the paths below `ATTRIBUTE` that the checkpoint has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found_paths: set[KeyPath] = set()

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,  # noqa: FBT001, FBT002  torch's signature
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        stored = metadata.state_dict_metadata
        requested = {
            name: path[len(ATTRIBUTE_PATH) :]
            for name, path in self.mappings.items()
            if path[: len(ATTRIBUTE_PATH)] == ATTRIBUTE_PATH
        }
        self.found_paths = {path for name, path in requested.items() if name in stored}
        self.state_dict: dict[str, Any] = {
            name: value for name, value in self.state_dict.items() if name not in requested or name in stored
        }


class _ConfigWithPlanner(FSDP2Config):
    """Composer's own class, with an attribute for a planner."""

    load_planner: Any = None
