"""What a checkpoint says it holds, entry by entry, before its tensors are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ema_dist.checkpoint.plain import Path


@dataclass(frozen=True)
class Contents:
    """The names in a checkpoint with their paths; an entry is what lies under the first key of a path.

    Args:
        metadata: as DCP wrote it.
        scalars: everything that is not a tensor, by DCP's name.
    """

    metadata: Metadata
    scalars: Mapping[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Where DCP took the value of that name from."""
        return tuple((self.metadata.planner_data or {}).get(name, (name,)))

    def shape(self, name: str) -> torch.Size:
        """Of a full tensor."""
        return self._tensor(name).size

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor as it is stored."""
        return self._tensor(name).properties.dtype

    def is_tensor(self, name: str) -> bool:
        """Whether a tensor lies under that name, rather than a plain value."""
        return isinstance(self.metadata.state_dict_metadata[name], TensorStorageMetadata)

    @property
    def entries(self) -> list[str]:
        """Their names."""
        return list(dict.fromkeys(str(self.path(name)[0]) for name in self.metadata.state_dict_metadata))

    def under(self, key: str) -> dict[Path, str]:
        """The names of one entry by their paths in it."""
        paths = {name: self.path(name) for name in self.metadata.state_dict_metadata}
        return {path[1:]: name for name, path in paths.items() if path[0] == key}

    def weights(self, key: str) -> dict[str, str]:
        """The names of tensors in an entry that holds a model, by the model's own names; without extra states."""
        return {
            ".".join(map(str, path)): name
            for path, name in self.under(key).items()
            if self.is_tensor(name) and not _is_extra_state(path)
        }

    def extra_states(self, key: str) -> dict[str, dict[Path, str]]:
        """What modules keep beside their tensors, by the model's own names, each by the paths in it."""
        found: dict[str, dict[Path, str]] = {}
        for path, name in self.under(key).items():
            if _is_extra_state(path):
                found.setdefault(str(path[0]), {})[path[1:]] = name
        return found

    def averages(self, key: str) -> dict[str, str]:
        """The names of averages and averaged buffers in an entry, by the model's own names; none in other entries.

        Raises: ValueError when there are several tracks.
        """
        tracks: dict[object, dict[str, str]] = {}
        for path, name in self.under(key).items():
            match path:
                case ("tracks", track, "averages" | "buffers", *rest):
                    tracks.setdefault(track, {})[".".join(map(str, rest))] = name
        if len(tracks) > 1:
            raise ValueError(f"expected one track of averages, found {list(tracks)}")
        return next(iter(tracks.values()), {})

    def model_with(self, names: Collection[str]) -> str | None:
        """The entry that holds a model with tensors of these names; None if none does."""
        for key in sorted(self.entries, key=lambda it: it != "model"):
            if self.weights(key).keys() >= set(names):
                return key
        return None

    def _tensor(self, name: str) -> TensorStorageMetadata:
        tensor = self.metadata.state_dict_metadata[name]
        assert isinstance(tensor, TensorStorageMetadata), f"{name} is not a tensor"
        return tensor


def _is_extra_state(path: Path) -> bool:
    return bool(path) and str(path[0]).endswith("_extra_state")
