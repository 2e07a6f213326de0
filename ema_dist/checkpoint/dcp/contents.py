"""What a checkpoint holds under the keys of the dictionary that was saved, before its tensors are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ema_dist.checkpoint.dcp.index import EXTRA_STATE_SUFFIX, CheckpointIndex
from ema_dist.checkpoint.values import KeyPath


@dataclass(frozen=True)
class Contents(CheckpointIndex):
    """The names in a checkpoint by entry: an entry is what lies under the first key of a path.

    Args:
        scalars: what is not a tensor, by DCP's name, once it has been read.
        model_keys: the entry of the model whose averages an entry holds, where that is known.
    """

    plain_values: dict[str, Any] = field(default_factory=dict)
    model_keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def entry_keys(self) -> list[str]:
        """Those of the entries."""
        return list(dict.fromkeys(str(path[0]) for path in self.key_paths.values()))

    def entry_names(self, key: str) -> dict[KeyPath, str]:
        """The names of one entry by their paths in it."""
        return {path[1:]: name for name, path in self.key_paths.items() if path[0] == key}

    def weight_names(self, key: str) -> dict[str, str]:
        """The names of tensors in an entry that holds a model, by the model's own names; without extra states."""
        return {
            ".".join(map(str, path)): name
            for path, name in self.entry_names(key).items()
            if name in self.tensors and not _is_extra_state(path)
        }

    def average_names(self, key: str) -> dict[str, str]:
        """The names of averages and averaged buffers in an entry, by the model's own names; none in other entries.

        Raises: ValueError when there are several tracks.
        """
        tracks = self.averages.get((key,), {})
        if len(tracks) > 1:
            raise ValueError(
                f"expected averages of one track, found {list(tracks)}: load them into a ShardedEMA, or export one by "
                "ema-dist export --track"
            )
        return next((track.all for track in tracks.values()), {})

    def find_model_key(self, key: str, names: Collection[str]) -> str | None:
        """The entry of the model whose averages another entry holds, or would hold; None if there is none.

        Args:
            names: of tensors that it has.
        """
        if key in self.model_keys:
            return self.model_keys[key]
        others = sorted(self.entry_keys, key=lambda other: other != "model")
        return next((other for other in others if self.weight_names(other).keys() >= set(names)), None)


def _is_extra_state(path: KeyPath) -> bool:
    return bool(path) and str(path[0]).endswith(EXTRA_STATE_SUFFIX)
