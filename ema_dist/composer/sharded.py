"""Averages in Composer's sharded checkpoints: an attribute of its State, whose tensors DCP saves and reshards.

The result of `Algorithm.state_dict` is one opaque object there, so that every rank would load the first rank's shard.
"""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

from composer.core import State
from composer.utils import FSDP2Config
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

ATTRIBUTE = "ema_dist"
"""The attribute of State that holds our part of a sharded checkpoint, to be saved or just loaded."""

ATTRIBUTE_PATH = ("state", ATTRIBUTE)

KeyPath: TypeAlias = tuple[str | int, ...]
"""The keys that lead to a value in nested dictionaries."""


class PlannerOverride:
    """Puts a `PartialLoadPlanner` into the FSDP configuration while Composer may load a sharded checkpoint.

    Composer collects all tensors to read into before it opens the checkpoint, and DCP raises if the checkpoint lacks
    one. But not every checkpoint holds averages, so the planner leaves out those of our tensors that are missing.
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
        """Raise ValueError where the user has chosen another planner."""
        if self._user_config.load_planner is not None:
            raise ValueError(
                f"expected no load_planner in the FSDP configuration, found {self._user_config.load_planner!r}: EMA "
                "needs its own, as not every checkpoint holds averages; leave it out, or load without EMA"
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
        self.state_dict = {
            name: value for name, value in self.state_dict.items() if name not in requested or name in stored
        }


class _ConfigWithPlanner(FSDP2Config):
    """Composer's own class, with an attribute for a planner."""

    load_planner: Any = None
