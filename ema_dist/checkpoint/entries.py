"""The values that users save and load: how each becomes tensors for DCP, and takes back what DCP has read."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from ema_dist.checkpoint.dcp.contents import Contents
from ema_dist.checkpoint.values import Path, flattened, nested, restored, storable
from ema_dist.ema import ShardedEMA
from ema_dist.evaluation.serving import servings_in
from ema_dist.evaluation.swap import exchanges_in
from ema_dist.messages import apart, few
from ema_dist.sharding import Layout, Shard, is_cut


class Entry(ABC):
    """One value of the dictionary that is saved or loaded.

    Args:
        key: its name there, and in the checkpoint.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    @abstractmethod
    def saved(self) -> Any:
        """Nested dictionaries of tensors (cut, where other ranks hold other parts) and plain values."""

    @abstractmethod
    def targets(self, contents: Contents) -> dict[str, Tensor]:
        """The tensors to read into, by their names in the checkpoint; nothing is changed yet.

        Raises: ValueError when what is stored does not fit.
        """

    @abstractmethod
    def take(self, contents: Contents) -> None:
        """Take over what has been read into the targets, and the plain values."""


@dataclass(frozen=True)
class Target:
    """This rank's part of a tensor, and the same dressed for DCP to read into."""

    shard: Shard
    local: Tensor
    wrapped: Tensor

    @classmethod
    def of(cls, shard: Shard, local: Tensor) -> Target:
        return cls(shard, local, shard.wrap(local))

    @torch.no_grad()
    def finish(self) -> None:
        """Dressed, a part may have become a copy (FSDP1, where dimensions are permuted in memory)."""
        value = self.shard.unwrap(self.wrapped)
        if value.data_ptr() != self.local.data_ptr():
            self.local.copy_(value)


class FreshTensors:
    """Values that are rebuilt from the checkpoint: their tensors are read into new ones on the CPU.

    Args:
        names: in the checkpoint, by their paths in the value.
        present: tensors that are read into in place, by their paths, where the dtype is theirs.
    """

    def __init__(self, names: Mapping[Path, str], contents: Contents, present: Mapping[Path, Tensor]) -> None:
        self._names = names
        self.tensors: dict[str, Tensor] = {}
        for path, name in names.items():
            if name in contents.tensors:
                here = present.get(path)
                fits = here is not None and here.dtype == contents.dtype(name)
                fresh = torch.empty(contents.shape(name), dtype=contents.dtype(name), device="cpu")
                self.tensors[name] = here if here is not None and (fits or is_cut(here)) else fresh

    def value(self, contents: Contents) -> Any:
        """The whole value, after the tensors have been read."""
        values: dict[str, Any] = {**contents.scalars, **self.tensors}
        return restored(nested({path: values[name] for path, name in self._names.items()}))


class Model(Entry):
    """A module, by the names of the unwrapped module's ``state_dict()``; its live weights, also during a swap.

    Reading an entry of averages, it gets these as its weights, and what has no average from the model beside them.
    """

    def __init__(self, key: str, module: nn.Module) -> None:
        super().__init__(key)
        self.layout = Layout(module, "copy")
        self._targets: list[Target] = []
        self._extra_states: dict[str, FreshTensors] = {}

    def saved(self) -> dict[str, Any]:
        exchanges = exchanges_in(self.layout.model)
        away = {_place(shard): tensor for exchange in exchanges for shard, tensor in exchange.live() if _place(shard)}
        weights: dict[str, Any] = {}
        for shard in self.layout.shards:
            place = _place(shard)
            weights |= dict.fromkeys(shard.names, away[place] if place in away else shard.wrap(shard.local))
        states = {name: module.get_extra_state() for name, module in self.layout.extra_states.items()}
        return weights | {name: storable(state, f"{self.key}.{name}") for name, state in states.items()}

    def targets(self, contents: Contents) -> dict[str, Tensor]:
        _refuse_if_taken(self.layout.model)
        averages = contents.averaged(self.key)
        source = contents.model_of(self.key, averages) if averages else self.key
        weights = (contents.weights(source) if source else {}) | averages
        states = contents.extra_states((source,)) if source else {}
        missing = {shard.name for shard in self.layout.shards} - weights.keys()
        unknown = weights.keys() - self.layout.by_any_name().keys()
        extra = self.layout.extra_states.keys()
        ours, theirs = missing | (extra - states.keys()), unknown | (states.keys() - extra)
        if different := apart("the model", ours, "the checkpoint", theirs):
            raise ValueError(f"it is of another model: {different}")
        refuse_other_shapes({weights[shard.name]: shard.shape for shard in self.layout.shards}, contents)
        self._targets = [Target.of(shard, shard.local) for shard in self.layout.shards]
        self._extra_states = {name: FreshTensors(names, contents, {}) for name, names in states.items()}
        of_states = {name: tensor for state in self._extra_states.values() for name, tensor in state.tensors.items()}
        return {weights[target.shard.name]: target.wrapped for target in self._targets} | of_states

    def take(self, contents: Contents) -> None:
        for target in self._targets:
            target.finish()
        for name, state in self._extra_states.items():
            self.layout.extra_states[name].set_extra_state(state.value(contents))


class Average(Entry):
    """A `ShardedEMA`; reading a checkpoint from before there were averages, it starts from the live weights there."""

    def __init__(self, key: str, ema: ShardedEMA) -> None:
        super().__init__(key)
        self.ema = ema
        self._state: dict[Path, Any] = {}

    def is_of(self, model: Model) -> bool:
        """Whether these are averages of that model: wrapped or not, it has the parameters that they follow."""
        return {*map(id, self.ema.model.parameters())} == {*map(id, model.layout.model.parameters())}

    def saved(self) -> dict[str, Any]:
        return self.ema.state_dict()

    def targets(self, contents: Contents) -> dict[str, Tensor]:
        _refuse_if_taken(self.ema.model)
        self._state = flattened(self.ema.state_dict())
        tensors = {path: value for path, value in self._state.items() if isinstance(value, Tensor)}
        stored = contents.of(self.key)
        if not stored:
            model = contents.model_of(self.key, [str(path[-1]) for path in tensors])
            if model is None:
                raise ValueError(
                    f"the checkpoint has neither averages nor live weights of these; it has {contents.keys}"
                )
            weights = contents.weights(model)
            first = self.ema.tracks[0]
            return self._fitting({it: weights[str(it[-1])] for it in tensors if _track(it) == first}, contents)
        averaged = {path for path, name in stored.items() if name in contents.tensors}
        if (found := sorted({*map(_track, averaged)})) != sorted(self.ema.tracks):
            raise ValueError(f"expected averages of the tracks {self.ema.tracks}, found {found}")
        ours = {str(path[-1]) for path in tensors.keys() - averaged}
        theirs = {str(path[-1]) for path in averaged - tensors.keys()}
        if different := apart("the model", ours, "the checkpoint", theirs):
            raise ValueError(f"these averages belong to another model: {different}")
        expected = self._state["format",]
        if (version := contents.scalars.get(stored.get(("format",), ""))) != expected:
            raise ValueError(f"expected averages of format {expected}, found format {version!r}")
        return self._fitting({path: stored[path] for path in tensors}, contents)

    def _fitting(self, sources: Mapping[Path, str], contents: Contents) -> dict[str, Tensor]:
        refuse_other_shapes({name: self._state[path].size() for path, name in sources.items()}, contents)
        return {name: self._state[path] for path, name in sources.items()}

    def take(self, contents: Contents) -> None:
        stored = contents.of(self.key)
        if stored:
            rest = {path: contents.scalars[name] for path, name in stored.items() if name not in contents.tensors}
        else:
            first = self.ema.tracks[0]
            tensors = [path for path, value in self._state.items() if isinstance(value, Tensor)]
            rest = {path: self._state[(path[0], first, *path[2:])] for path in tensors}
            rest |= {("steps",): 0, ("updates",): 0}
            warnings.warn(
                f"the checkpoint has no averages under {self.key!r}: they start from its live weights, at step 0",
                stacklevel=4,
            )
        self.ema.load_state_dict(nested(self._state | rest))


def _track(path: Path) -> str:
    """Whose tensor lies there, in a state of `ShardedEMA`."""
    return str(path[1])


class Other(Entry):
    """Any Stateful object, or a plain value, which takes its place in the user's dictionary."""

    def __init__(self, key: str, state: MutableMapping[str, Any]) -> None:
        super().__init__(key)
        self._state = state
        self._read: FreshTensors | None = None

    def saved(self) -> Any:
        return storable(self._current(), self.key)

    def targets(self, contents: Contents) -> dict[str, Tensor]:
        stored = contents.of(self.key)
        if not stored:
            raise ValueError(f"the checkpoint has no such entry; it has {contents.keys}")
        present = {path: leaf for path, leaf in flattened(self._current()).items() if isinstance(leaf, Tensor)}
        if missing := present.keys() - stored.keys():
            raise ValueError(
                f"the checkpoint lacks the tensors {few(sorted('.'.join(map(str, path)) for path in missing))}"
            )
        refuse_other_shapes({stored[path]: leaf.size() for path, leaf in present.items()}, contents)
        self._read = FreshTensors(stored, contents, present)
        return self._read.tensors

    def take(self, contents: Contents) -> None:
        assert self._read is not None, "targets() comes first"
        value = self._read.value(contents)
        if isinstance(stateful := self._state[self.key], Stateful):
            stateful.load_state_dict(value)
        else:
            self._state[self.key] = value

    def _current(self) -> Any:
        value = self._state[self.key]
        return value.state_dict() if isinstance(value, Stateful) else value


def _refuse_if_taken(model: nn.Module) -> None:
    if exchanges_in(model):
        raise ValueError("the model holds its averages, inside swapped(); load after the block")
    if servings_in(model):
        raise ValueError("the model reads its averages, inside serving(); load after the block")


def _place(shard: Shard) -> tuple[int, torch.Size] | None:
    """Where the model holds this rank's part; None for a part without elements, which all look alike."""
    return (shard.local.data_ptr(), shard.local.shape) if shard.local.numel() else None


def refuse_other_shapes(shapes: Mapping[str, torch.Size], contents: Contents) -> None:
    """Raise ValueError when tensors, by their names in the checkpoint, are stored in other shapes, or are none."""
    different: list[str] = []
    for name, shape in shapes.items():
        stored = tuple(contents.shape(name)) if name in contents.tensors else "no tensor"
        if stored != tuple(shape):
            different.append(f"{name} ({tuple(shape)}, stored {stored})")
    if different:
        raise ValueError(f"other shapes are stored than expected: {few(different)}")
