"""Averages in Composer's sharded checkpoints: an attribute of its State, whose tensors DCP cuts up and reshards.

What `Algorithm.state_dict` returns would be one opaque object there, and every rank would load the first one's shard.
"""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

from composer.core import State
from composer.utils import FSDP2Config
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

ATTRIBUTE = "ema_dist"
"""Of State: what goes into a sharded checkpoint, and what came out of one."""

ATTRIBUTE_PATH = ("state", ATTRIBUTE)

KeyPath: TypeAlias = tuple[str | int, ...]
"""Where a value lies in nested dictionaries."""


class PlannerOverride:
    """The time in which Composer may read a sharded checkpoint, which need not hold averages.

    Composer asks State for all that is to be read into before it looks at the checkpoint, and DCP does not go on where
    anything of that is missing. So the configuration gets a planner that leaves out what is missing of ours.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._planner = PartialLoadPlanner()
        self._user_config: Any = state.fsdp_config
        config = copy.copy(self._user_config)
        if isinstance(config, FSDP2Config):
            config.__class__ = _ConfigWithPlanner
        config.load_planner = self._planner
        state.fsdp_config = config

    def require_own_planner(self) -> None:
        """Raise ValueError where the user has chosen another planner."""
        if self._user_config.load_planner is not None:
            raise ValueError(
                f"expected no load_planner in the FSDP configuration, found {self._user_config.load_planner!r}: EMA needs "
                "its own, as not every checkpoint holds averages; leave it out, or load without EMA"
            )

    def restore_config(self) -> set[KeyPath]:
        """Put the user's configuration back; the paths below `ATTRIBUTE` of what was in the checkpoint."""
        self._state.fsdp_config = self._user_config
        return self._planner.found_paths


class PartialLoadPlanner(DefaultLoadPlanner):
    """Reads what there is of ours, and all of the rest.

    `found_paths` has the paths below `ATTRIBUTE` of what was there.
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
    """Composer's own has no place for a planner."""

    load_planner: Any = None
