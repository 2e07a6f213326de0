"""Finds the models, optimizers and averages in any DCP checkpoint from the names of its entries alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ema_dist.checkpoint.values import KeyPath

EXTRA_STATE_SUFFIX = "_extra_state"
"""The end of the name under which torch saves the result of a module's ``get_extra_state``."""

LIGHTNING_LIVE = "ema_dist_live"
"""The key of the live weights among the model's weights, in a sharded checkpoint that `ema_dist.lightning` saved.

Live weights without an average are the model's weights there, and are not repeated under this key."""

LIGHTNING_STATE = "ema_dist"
"""The key, there, of the averages' state without the tensors that are the model's weights in that checkpoint."""


@dataclass(frozen=True)
class TrackNames:
    """The DCP names of the averages and averaged buffers of one track, by the tensor's own name."""

    averages: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, str]:
        """Both together."""
        return {**self.averages, **self.buffers}


@dataclass(frozen=True)
class CheckpointIndex:
    """The contents of a checkpoint according to its metadata: names, shapes and dtypes.

    Models, optimizers and averages are found at any depth. Each has a path; a checkpoint that consists of one model's
    state has that model at the empty path.
    """

    metadata: Metadata

    @cached_property
    def key_paths(self) -> dict[str, KeyPath]:
        """The path of each DCP name in the dictionary that was saved."""
        # Only planner_data keeps the order of the dictionary; DCP orders the entries by the ranks that wrote them.
        stored = self.metadata.state_dict_metadata
        paths = {name: path for name, path in self.metadata.planner_data.items() if name in stored}
        in_lightning = self._lightning_paths(paths)  # first, because they are in the order of the model
        return in_lightning | {name: path for name, path in paths.items() if name not in in_lightning}

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Every tensor by its DCP name."""
        entries = {name: self.metadata.state_dict_metadata[name] for name in self.key_paths}
        return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    @cached_property
    def averages(self) -> dict[KeyPath, dict[str, TrackNames]]:
        """The states of `ShardedEMA` by path, and the tracks of each."""
        all_paths = set(self.key_paths.values())
        states: dict[KeyPath, dict[str, TrackNames]] = {}
        for name in self.tensors:
            path = self.key_paths[name]
            for depth in range(len(path) - 3):
                prefix = path[:depth]
                match path[depth:]:
                    case ("tracks", track, "averages" | "buffers" as kind, *inner) if (*prefix, "format") in all_paths:
                        track_names = states.setdefault(prefix, {}).setdefault(str(track), TrackNames())
                        getattr(track_names, kind)[dotted_name(inner)] = name
        return states

    @cached_property
    def optimizers(self) -> list[KeyPath]:
        """The paths of optimizers: dictionaries that hold parameter groups, or a state for each parameter."""
        optimizer_paths: dict[KeyPath, None] = {}
        for path in self.key_paths.values():
            if _is_under(path, self.averages):
                continue
            for depth, key in enumerate(path):
                is_groups = key == "param_groups" or str(key).startswith("param_groups.")
                if is_groups or (key == "state" and 0 < depth < len(path) - 2):
                    optimizer_paths[path[:depth]] = None
                    break
        return list(optimizer_paths)

    @cached_property
    def optimized_names(self) -> set[str]:
        """The names of the parameters for which an optimizer holds a state; empty if it numbers them."""
        names: set[str] = set()
        for path in self.key_paths.values():
            match [path[len(optimizer) :] for optimizer in self.optimizers if _is_under(path, [optimizer])]:
                case [("state", str(name), _)]:
                    names.add(name)
                case [(str(name),)] if name.startswith("state."):
                    names.add(name.removeprefix("state.").rpartition(".")[0])
        return names

    @cached_property
    def models(self) -> dict[KeyPath, dict[str, str]]:
        """The entries that may be models, by path: the DCP names of their tensors, by the tensors' own names."""
        candidates: defaultdict[KeyPath, dict[str, str]] = defaultdict(dict)
        for name in self.tensors:
            path = self.key_paths[name]
            is_excluded = _is_under(path, self.averages) or _is_under(path, self.optimizers)
            if not is_excluded and not any(str(key).endswith(EXTRA_STATE_SUFFIX) for key in path[:-1]):
                candidates[path[:-1]][str(path[-1])] = name
        floating = {
            path: names for path, names in candidates.items() if any(map(self.is_floating_point, names.values()))
        }
        return {
            path: names for path, names in floating.items() if not any(_is_under(other, [path]) for other in floating)
        }

    def matching_models(self, averages: KeyPath) -> list[KeyPath]:
        """The models that share the most names with these averages; of these, only those with equal shapes if any."""
        averaged = {
            name: dcp_name for track in self.averages[averages].values() for name, dcp_name in track.all.items()
        }
        shared = {path: len(averaged.keys() & tensors.keys()) for path, tensors in self.models.items()}
        best = [path for path, count in shared.items() if count and count == max(shared.values())]
        return [path for path in best if self._same_shapes(averaged, self.models[path])] or best

    def entries(self) -> Iterator[tuple[KeyPath, str]]:
        """The path and kind of every model, optimizer and state of averages, and the first key of everything else."""
        return ((path, kind) for path, kind, _ in self.names_by_entry())

    def names_by_entry(self) -> Iterator[tuple[KeyPath, str, list[str]]]:
        """The path and kind of each of `entries`, and the DCP names in it that are in no deeper entry."""
        kinds = {**dict.fromkeys(self.models, "model"), **dict.fromkeys(self.optimizers, "optimizer")}
        kinds |= dict.fromkeys(self.averages, "averages")
        deepest = sorted(kinds, key=len, reverse=True)
        entries: defaultdict[KeyPath, list[str]] = defaultdict(list)
        for name, path in self.key_paths.items():
            entries[next((entry for entry in deepest if _is_under(path, [entry])), path[:1])].append(name)
        return ((path, kinds.get(path, "other"), names) for path, names in entries.items())

    def extra_states(self, model: KeyPath) -> dict[str, dict[KeyPath, str]]:
        """The extra states in a model, by name: the DCP names of their parts by path."""
        states: defaultdict[str, dict[KeyPath, str]] = defaultdict(dict)
        for name, path in self.key_paths.items():
            if _is_under(path, [model]):
                key, *rest = path[len(model) :]
                if str(key).endswith(EXTRA_STATE_SUFFIX):
                    states[str(key)][tuple(rest)] = name
        return dict(states)

    def names_under(self, path: KeyPath) -> list[str]:
        """The DCP names at a path or below it."""
        return [name for name, key_path in self.key_paths.items() if key_path == path or _is_under(key_path, [path])]

    def shape(self, name: str) -> torch.Size:
        """The shape of a full tensor."""
        return self.tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored."""
        return self.tensors[name].properties.dtype

    def is_floating_point(self, name: str) -> bool:
        """Whether a tensor has a floating-point dtype; complex dtypes do not count."""
        return self.dtype(name).is_floating_point

    def nbytes(self, name: str) -> int:
        """The size of a full tensor in bytes."""
        return self.shape(name).numel() * self.dtype(name).itemsize

    def num_chunks(self, name: str) -> int:
        """The number of chunks in which a tensor is stored."""
        return len(self.tensors[name].chunks)

    def _lightning_paths(self, paths: Mapping[str, KeyPath]) -> dict[str, KeyPath]:
        """The paths of tensors that a sharded checkpoint of Lightning holds as the model's weights.

        These are averages, which belong in the state of `ShardedEMA`, and live weights without an average. Live weights
        are in the order of the model.
        """
        names = {path: name for name, path in paths.items()}
        result: dict[str, KeyPath] = {}
        for root in dict.fromkeys(path[:-2] for path in names if path[-2:-1] == (LIGHTNING_LIVE,)):
            tracks_path = (*root, LIGHTNING_STATE, "tracks")
            depth = len(tracks_path)
            tracks = [str(path[depth]) for path in names if len(path) > depth and path[:depth] == tracks_path]
            if not tracks:
                continue
            track_path = (*tracks_path, swapped_in_track(tracks))
            for path, name in names.items():
                if not path or path[:-1] != root:
                    continue
                key = path[-1]
                live_path = (*root, LIGHTNING_LIVE, key)
                if live_path not in names:
                    result[name] = live_path
                    continue
                result[names[live_path]] = live_path
                # Buffers, and averages of another dtype than their weights, are stored in the state as well.
                if not names.keys() & {(*track_path, kind, key) for kind in ("averages", "buffers")}:
                    result[name] = (*track_path, "averages", key)
        return result

    def _same_shapes(self, averaged: dict[str, str], tensors: dict[str, str]) -> bool:
        shared = averaged.keys() & tensors.keys()
        return all(self.shape(averaged[name]) == self.shape(tensors[name]) for name in shared)


def swapped_in_track(tracks: Iterable[str]) -> str:
    """The track that Lightning's checkpoints hold as the model's weights: ``default``, or else the first one."""
    names = [*tracks]
    return "default" if "default" in names else names[0]


def dotted_name(path: Sequence[str | int]) -> str:
    """A path as text: its keys joined by dots."""
    return ".".join(str(key) for key in path)


def _is_under(path: KeyPath, others: Iterable[KeyPath]) -> bool:
    return any(len(other) < len(path) and path[: len(other)] == other for other in others)
