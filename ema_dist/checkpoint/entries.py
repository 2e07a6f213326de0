"""Entries: how each value that a user saves becomes tensors for DCP, and how it takes over what DCP has read."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from ema_dist.averages.initial_weights import InitialWeightsWarning, describe_stored
from ema_dist.averages.live_writes import note_load
from ema_dist.checkpoint.dcp.contents import Contents
from ema_dist.checkpoint.values import KeyPath, flatten, pack_value, require_plain_tensor, unflatten, unpack_value
from ema_dist.ema import ShardedEMA
from ema_dist.evaluation.serving import active_servings
from ema_dist.evaluation.swap import active_swaps
from ema_dist.messages import abbreviated, describe_difference, warn_caller
from ema_dist.schedules.decay import DecayRecord, read_clock
from ema_dist.sharding import Layout, Shard, is_sharded


class Entry(ABC):
    """One value of the dictionary that is saved or loaded.

    Args:
        key: the value's key in that dictionary, and in the checkpoint.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    @abstractmethod
    def state_to_save(self) -> Any:
        """Nested dictionaries of tensors (wrapped for DCP, where ranks hold different shards) and plain values."""

    @abstractmethod
    def targets(self, contents: Contents) -> dict[str, Tensor]:
        """The tensors to read into, by their DCP names; changes nothing yet.

        Raises: ValueError when the stored entry does not fit this value.
        """

    @abstractmethod
    def finish_load(self, contents: Contents) -> None:
        """Take over the tensors that were read into the targets, and the plain values."""


@dataclass(frozen=True)
class Target:
    """This rank's shard of a tensor, and the same tensor wrapped for DCP to read into."""

    shard: Shard
    local: Tensor
    wrapped: Tensor

    @classmethod
    def create(cls, shard: Shard, local: Tensor) -> Target:
        return cls(shard, local, shard.wrap(local))

    @torch.no_grad()
    def copy_back(self) -> None:
        """Copy ``wrapped`` into ``local`` if wrapping made a copy, as for FSDP1 weights with permuted dimensions."""
        value = self.shard.unwrap(self.wrapped)
        if value.data_ptr() != self.local.data_ptr():
            self.local.copy_(value)


class RebuiltValue:
    """A nested value that is rebuilt from the checkpoint, with its tensors on the CPU.

    Args:
        names: the DCP names of its parts, by their paths in the value.
        existing: tensors of the current value by path; read into in place if they are sharded or of the stored dtype.
    """

    def __init__(self, names: Mapping[KeyPath, str], contents: Contents, existing: Mapping[KeyPath, Tensor]) -> None:
        self._names = names
        self.tensors: dict[str, Tensor] = {}
        for path, name in names.items():
            if name in contents.tensors:
                target = existing.get(path)
                same_dtype = target is not None and target.dtype == contents.dtype(name)
                fresh = torch.empty(contents.shape(name), dtype=contents.dtype(name), device="cpu")
                self.tensors[name] = target if target is not None and (same_dtype or is_sharded(target)) else fresh

    def value(self, contents: Contents) -> Any:
        """The rebuilt value; call it after the tensors have been read."""
        values: dict[str, Any] = {**contents.plain_values, **self.tensors}
        return unpack_value(unflatten({path: values[name] for path, name in self._names.items()}))


class ModelEntry(Entry):
    """A module's live weights, even during a swap, under the names of the unwrapped module's ``state_dict()``.

    If the checkpoint holds averages under this key, they become the module's weights; tensors without an average are
    read from the model saved beside them.
    """

    def __init__(self, key: str, module: nn.Module) -> None:
        super().__init__(key)
        self.layout: Layout = Layout(module, "copy")
        self._targets: list[Target] = []
        self._extra_states: dict[str, RebuiltValue] = {}

    def state_to_save(self) -> dict[str, Any]:
        swaps = active_swaps(self.layout.model)
        # The module may be a submodule of a swapped model, where its tensors have other names: match them by storage.
        swapped_out = {
            _storage_key(shard): tensor
            for swap in swaps
            for shard, tensor in swap.live_tensors()
            if _storage_key(shard)
        }
        weights: dict[str, Any] = {}
        for shard in self.layout.shards:
            require_plain_tensor(shard.local, f"{self.key}.{shard.name}")
            storage = _storage_key(shard)
            weights |= dict.fromkeys(
                shard.names, swapped_out[storage] if storage in swapped_out else shard.wrap(shard.local)
            )
        extra_states = {name: module.get_extra_state() for name, module in self.layout.extra_states.items()}
        return weights | {name: pack_value(state, f"{self.key}.{name}") for name, state in extra_states.items()}

    def targets(self, contents: Contents) -> dict[str, Tensor]:
        _require_not_active(self.layout.model)
        self.layout.require_writable()
        averages = contents.average_names(self.key)
        if averages:
            _warn_of_initial_weights(self.key, contents)
        source = contents.find_model_key(self.key, averages) if averages else self.key
        weight_names = (contents.weight_names(source) if source else {}) | averages
        extra_states = contents.extra_states((source,)) if source else {}
        expected_states = self.layout.extra_states.keys()
        only_in_model = {shard.name for shard in self.layout.shards} - weight_names.keys()
        only_in_model |= expected_states - extra_states.keys()
        only_in_checkpoint = weight_names.keys() - self.layout.shards_by_name().keys()
        only_in_checkpoint |= extra_states.keys() - expected_states
        if difference := describe_difference("the model", only_in_model, "the checkpoint", only_in_checkpoint):
            raise ValueError(f"the checkpoint was saved from a different model: {difference}")
        _require_same_shapes({weight_names[shard.name]: shard.shape for shard in self.layout.shards}, contents)
        self.layout.wait_for_device()  # queued passes may still copy the weights that are about to be read into
        self._targets = [Target.create(shard, shard.local) for shard in self.layout.shards]
        self._extra_states = {name: RebuiltValue(names, contents, {}) for name, names in extra_states.items()}
        extra_tensors = {
            name: tensor for state in self._extra_states.values() for name, tensor in state.tensors.items()
        }
        return {weight_names[target.shard.name]: target.wrapped for target in self._targets} | extra_tensors

    def finish_load(self, contents: Contents) -> None:
        for target in self._targets:
            target.copy_back()
        note_load(self.layout.model)
        for name, state in self._extra_states.items():
            self.layout.extra_states[name].set_extra_state(state.value(contents))


class EMAEntry(Entry):
    """A `ShardedEMA`. If the checkpoint has no averages for it, the averages start from the live weights stored there.

    Args:
        models: the model entries beside it. If one of them contains its model, that entry loads the live weights.
    """

    def __init__(self, key: str, ema: ShardedEMA, models: Iterable[ModelEntry]) -> None:
        super().__init__(key)
        self.ema = ema
        self._is_model_loaded = any(_parameter_ids(ema.model) <= _parameter_ids(model.layout.model) for model in models)
        self._state: dict[KeyPath, Any] = {}

    def belongs_to(self, model: ModelEntry) -> bool:
        """Whether these are averages of that model: both hold the same parameters, wrapped or not."""
        return _parameter_ids(self.ema.model) == _parameter_ids(model.layout.model)

    def compared(self) -> Sequence[Mapping[str, str]]:
        """What ranks compare before they save."""
        return compared_counts(self.ema)

    def state_to_save(self) -> dict[str, Any]:
        return self.ema.state_dict()

    def targets(self, contents: Contents) -> dict[str, Tensor]:
        _require_not_active(self.ema.model)
        self._state = flatten(self.ema.state_dict(for_loading=True))
        tensors = {path: value for path, value in self._state.items() if isinstance(value, Tensor)}
        stored = contents.entry_names(self.key)
        if not stored and self._is_model_loaded:
            return {}
        if not stored:
            model = contents.find_model_key(self.key, [str(path[-1]) for path in tensors])
            if model is None:
                raise ValueError(
                    f"expected averages or live weights of its model in the checkpoint, found {contents.entry_keys}"
                )
            weight_names = contents.weight_names(model)
            first_track = self.ema.tracks[0]
            return self._checked_targets(
                {path: weight_names[str(path[-1])] for path in tensors if _track_name(path) == first_track}, contents
            )
        average_paths = {path for path, name in stored.items() if name in contents.tensors}
        if (found_tracks := sorted({*map(_track_name, average_paths)})) != sorted(self.ema.tracks):
            raise ValueError(f"expected averages of the tracks {self.ema.tracks}, found {found_tracks}")
        only_in_model = {str(path[-1]) for path in tensors.keys() - average_paths}
        only_in_checkpoint = {str(path[-1]) for path in average_paths - tensors.keys()}
        if difference := describe_difference("the model", only_in_model, "the checkpoint", only_in_checkpoint):
            raise ValueError(f"the averages were saved from a different model: {difference}")
        expected = self._state["format",]
        if (version := contents.plain_values.get(stored.get(("format",), ""))) != expected:
            raise ValueError(f"expected averages of format {expected}, found format {version!r}")
        return self._checked_targets({path: stored[path] for path in tensors}, contents)

    def _checked_targets(self, sources: Mapping[KeyPath, str], contents: Contents) -> dict[str, Tensor]:
        _require_same_shapes({name: self._state[path].size() for path, name in sources.items()}, contents)
        return {name: self._state[path] for path, name in sources.items()}

    def finish_load(self, contents: Contents) -> None:
        stored = contents.entry_names(self.key)
        if not stored:
            warnings.warn(
                f"the checkpoint has no averages under {self.key!r}: they start from its live weights, at step 0",
                stacklevel=4,
            )
        if not stored and self._is_model_loaded:
            self.ema.reset()
            return
        if stored:
            loaded = {
                path: contents.plain_values[name] for path, name in stored.items() if name not in contents.tensors
            }
        else:
            first_track = self.ema.tracks[0]
            tensors = [path for path, value in self._state.items() if isinstance(value, Tensor)]
            loaded = {path: self._state[(path[0], first_track, *path[2:])] for path in tensors}
            loaded |= {("steps",): 0, ("updates",): 0}
        self.ema.load_state_dict(unflatten(self._state | loaded))


def _parameter_ids(model: nn.Module) -> set[int]:
    return {*map(id, model.parameters())}


def compared_counts(ema: ShardedEMA) -> Sequence[Mapping[str, str]]:
    """The calls and counts of averages, which must be equal on all ranks before they are written."""
    return ema.call_history.compared(steps=ema.steps, updates=ema.updates, time=ema.time)


def _track_name(path: KeyPath) -> str:
    """The track of the tensor at this path in a state of `ShardedEMA`."""
    return str(path[1])


class OtherEntry(Entry):
    """Any other Stateful object, or a plain value, which `load` replaces in the user's dictionary."""

    def __init__(self, key: str, state: MutableMapping[str, Any]) -> None:
        super().__init__(key)
        self._state = state
        self._rebuilt: RebuiltValue | None = None

    def state_to_save(self) -> Any:
        return pack_value(self._current_value(), self.key)

    def targets(self, contents: Contents) -> dict[str, Tensor]:
        stored = contents.entry_names(self.key)
        if not stored:
            raise ValueError(f"the checkpoint has no such entry; it has {contents.entry_keys}")
        existing = {path: leaf for path, leaf in flatten(self._current_value()).items() if isinstance(leaf, Tensor)}
        if missing := existing.keys() - stored.keys():
            raise ValueError(
                f"the checkpoint lacks the tensors {abbreviated(sorted('.'.join(map(str, path)) for path in missing))}"
            )
        _require_same_shapes({stored[path]: leaf.size() for path, leaf in existing.items()}, contents)
        self._rebuilt = RebuiltValue(stored, contents, existing)
        return self._rebuilt.tensors

    def finish_load(self, contents: Contents) -> None:
        assert self._rebuilt is not None, "targets() comes first"
        value = self._rebuilt.value(contents)
        if isinstance(stateful := self._state[self.key], Stateful):
            stateful.load_state_dict(value)
        else:
            self._state[self.key] = value

    def _current_value(self) -> Any:
        value = self._state[self.key]
        return value.state_dict() if isinstance(value, Stateful) else value


def _warn_of_initial_weights(key: str, contents: Contents) -> None:
    """Warn on the first rank if the averages that will be a model's weights are still the initial ones."""
    names = contents.entry_names(key)
    (track,) = contents.averages[(key,)]

    def stored(*path: str) -> Any:
        return contents.plain_values[names[path]]

    record = DecayRecord.parse(*(stored("tracks", track, "decay", part) for part in ("kind", "value")))
    clock_state = read_clock({track: record}, steps=int(stored("steps")), updates=int(stored("updates")))
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if is_first and (note := describe_stored(clock_state, track, record.describe())):
        warn_caller(f"checkpoint.load(): {key!r}: {note}", InitialWeightsWarning)


def _require_not_active(model: nn.Module) -> None:
    if active_swaps(model):
        raise ValueError("the model holds its averages inside swapped(): load after the block")
    if active_servings(model):
        raise ValueError("the model reads its averages inside serving(): load after the block")


def _storage_key(shard: Shard) -> tuple[int, torch.Size] | None:
    """Identifies the memory of a shard; None for an empty shard, because all empty shards look the same."""
    return (shard.local.data_ptr(), shard.local.shape) if shard.local.numel() else None


def _require_same_shapes(shapes: Mapping[str, torch.Size], contents: Contents) -> None:
    """Raise ValueError unless each entry, by DCP name, is stored as a tensor of the expected shape."""
    mismatches: list[str] = []
    for name, shape in shapes.items():
        stored = tuple(contents.shape(name)) if name in contents.tensors else "no tensor"
        if stored != tuple(shape):
            mismatches.append(f"{name} (expected {tuple(shape)}, stored {stored})")
    if mismatches:
        raise ValueError(f"the shapes in the checkpoint differ: {abbreviated(mismatches)}")
