"""What a checkpoint holds under each key of the dictionary that was saved, before its tensors are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ema_dist.checkpoint.dcp.checkpoint_index import EXTRA_STATE_SUFFIX, CheckpointIndex
from ema_dist.checkpoint.values import KeyPath


@dataclass(frozen=True)
class Contents(CheckpointIndex):
    """The names in a checkpoint by entry: an entry is everything under one key of the dictionary that was saved.

    Args:
        plain_values: the values that are not tensors, by DCP name, once they have been read.
        model_keys: the key of the averaged model's entry, by the key of the entry with its averages, where known.
    """

    plain_values: dict[str, Any] = field(default_factory=dict)
    model_keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def entry_keys(self) -> list[str]:
        """The keys of all entries."""
        return list(dict.fromkeys(str(path[0]) for path in self.key_paths.values()))

    def entry_names(self, key: str) -> dict[KeyPath, str]:
        """The DCP names in one entry, by path below its key."""
        return {path[1:]: name for name, path in self.key_paths.items() if path[0] == key}

    def weight_names(self, key: str) -> dict[str, str]:
        """The DCP names of the tensors of a model's entry, by the model's own names; without extra states."""
        return {
            ".".join(map(str, path)): name
            for path, name in self.entry_names(key).items()
            if name in self.tensors and not _is_extra_state(path)
        }

    def average_names(self, key: str) -> dict[str, str]:
        """The DCP names of the averages in an entry, by the model's own names; empty if it holds no averages.

        Raises: ValueError when there are several tracks.
        """
        tracks = self.averages.get((key,), {})
        if len(tracks) > 1:
            raise ValueError(
                f"expected averages of one track, found {list(tracks)}: load them into a ShardedEMA, or export one "
                "with ema-dist export --track"
            )
        return next((track.all for track in tracks.values()), {})

    def find_model_key(self, key: str, names: Collection[str]) -> str | None:
        """The key of the model whose averages the entry ``key`` holds or would hold; None if there is none.

        Args:
            names: names of tensors that the model must have.
        """
        if key in self.model_keys:
            return self.model_keys[key]
        others = sorted(self.entry_keys, key=lambda other: other != "model")
        return next((other for other in others if self.weight_names(other).keys() >= set(names)), None)


def _is_extra_state(path: KeyPath) -> bool:
    return bool(path) and str(path[0]).endswith(EXTRA_STATE_SUFFIX)
