"""What lies where in a checkpoint of anyone's: models, optimizers and averages, told apart by their names alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ema_dist.checkpoint.values import Path

EXTRA_STATE = "_extra_state"
"""How torch ends the name of what a module's ``get_extra_state`` returned."""


@dataclass(frozen=True)
class Track:
    """The DCP names of the averages and averaged buffers of one track, by the tensor's own name."""

    averages: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, str]:
        """Both together."""
        return {**self.averages, **self.buffers}


@dataclass(frozen=True)
class Outline:
    """What a checkpoint holds, as its metadata tells: names, shapes and dtypes.

    Models, optimizers and averages are found wherever they were saved, however deep, by their paths there; a checkpoint
    that is one model's state and nothing else holds it at the empty path.
    """

    metadata: Metadata

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Where each DCP name lay in what was saved."""
        return {name: self.metadata.planner_data[name] for name in self.metadata.state_dict_metadata}

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Every tensor by its DCP name."""
        everything = self.metadata.state_dict_metadata
        return {name: it for name, it in everything.items() if isinstance(it, TensorStorageMetadata)}

    @cached_property
    def averages(self) -> dict[Path, dict[str, Track]]:
        """The states of `ShardedEMA` by path, and the tracks of each."""
        everywhere = set(self.paths.values())
        found: dict[Path, dict[str, Track]] = {}
        for name in self.tensors:
            path = self.paths[name]
            for depth in range(len(path) - 3):
                above = path[:depth]
                match path[depth:]:
                    case ("tracks", track, "averages" | "buffers" as kind, *inner) if (*above, "format") in everywhere:
                        tracks = found.setdefault(above, {}).setdefault(str(track), Track())
                        getattr(tracks, kind)[dotted(inner)] = name
        return found

    @cached_property
    def optimizers(self) -> list[Path]:
        """The paths of optimizers' states: whatever holds parameter groups, or a state for each parameter."""
        found: dict[Path, None] = {}
        for path in self.paths.values():
            if _is_under(path, self.averages):
                continue
            for depth, key in enumerate(path):
                is_groups = key == "param_groups" or str(key).startswith("param_groups.")
                if is_groups or (key == "state" and 0 < depth < len(path) - 2):
                    found[path[:depth]] = None
                    break
        return list(found)

    @cached_property
    def optimized(self) -> set[str]:
        """The names of the parameters for which an optimizer holds a state; none where it numbers them."""
        found: set[str] = set()
        for path in self.paths.values():
            match [path[len(place) :] for place in self.optimizers if _is_under(path, [place])]:
                case [("state", str(name), _)]:
                    found.add(name)
                case [(str(name),)] if name.startswith("state."):
                    found.add(name.removeprefix("state.").rpartition(".")[0])
        return found

    @cached_property
    def models(self) -> dict[Path, dict[str, str]]:
        """What may be a model's state, by path: the DCP names of its tensors by their own names."""
        found: defaultdict[Path, dict[str, str]] = defaultdict(dict)
        for name in self.tensors:
            path = self.paths[name]
            apart = _is_under(path, self.averages) or _is_under(path, self.optimizers)
            if not apart and not any(str(key).endswith(EXTRA_STATE) for key in path[:-1]):
                found[path[:-1]][str(path[-1])] = name
        floating = {path: names for path, names in found.items() if any(map(self.is_floating_point, names.values()))}
        return {path: names for path, names in floating.items() if not any(_is_under(it, [path]) for it in floating)}

    def models_of(self, averages: Path) -> list[Path]:
        """The models that share most names with a state of averages, those of the same shapes if there are any."""
        averaged = {name: it for track in self.averages[averages].values() for name, it in track.all.items()}
        shared = {path: len(averaged.keys() & tensors.keys()) for path, tensors in self.models.items()}
        best = [path for path, count in shared.items() if count and count == max(shared.values())]
        return [path for path in best if self._same_shapes(averaged, self.models[path])] or best

    def entries(self) -> Iterator[tuple[Path, str]]:
        """Every model, optimizer and state of averages with its kind, and the first keys of all beside them."""
        kinds = {**dict.fromkeys(self.models, "model"), **dict.fromkeys(self.optimizers, "optimizer")}
        kinds |= dict.fromkeys(self.averages, "averages")
        deepest = sorted(kinds, key=len, reverse=True)
        known = dict.fromkeys(
            next((entry for entry in deepest if _is_under(path, [entry])), path[:1]) for path in self.paths.values()
        )
        return ((path, kinds.get(path, "other")) for path in known)

    def extra_states(self, model: Path) -> dict[str, dict[Path, str]]:
        """The extra states in a model, by name: the DCP names of their parts by path."""
        found: defaultdict[str, dict[Path, str]] = defaultdict(dict)
        for name, path in self.paths.items():
            if _is_under(path, [model]):
                key, *rest = path[len(model) :]
                if str(key).endswith(EXTRA_STATE):
                    found[str(key)][tuple(rest)] = name
        return dict(found)

    def under(self, path: Path) -> list[str]:
        """The DCP names of all that lies under a path, or at it."""
        return [name for name, at in self.paths.items() if at == path or _is_under(at, [path])]

    def shape(self, name: str) -> torch.Size:
        """Of a full tensor."""
        return self.tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor as it is stored."""
        return self.tensors[name].properties.dtype

    def is_floating_point(self, name: str) -> bool:
        """Whether a tensor is of floating dtype; a complex one is not."""
        return self.dtype(name).is_floating_point

    def nbytes(self, name: str) -> int:
        """The size of a full tensor in bytes."""
        return self.shape(name).numel() * self.dtype(name).itemsize

    def pieces(self, name: str) -> int:
        """Into how many pieces a tensor was cut when it was saved."""
        return len(self.tensors[name].chunks)

    def _same_shapes(self, averaged: dict[str, str], tensors: dict[str, str]) -> bool:
        both = averaged.keys() & tensors.keys()
        return all(self.shape(averaged[name]) == self.shape(tensors[name]) for name in both)


def dotted(path: Sequence[str | int]) -> str:
    """A path as one writes it."""
    return ".".join(str(key) for key in path)


def _is_under(path: Path, others: Iterable[Path]) -> bool:
    return any(len(other) < len(path) and path[: len(other)] == other for other in others)
