"""Pairs imported averages with the tensors of the model: by name, or by position where they have no names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.importing.foreign_averages import ForeignAverages
from ema_dist.checkpoint.importing.named_tensors import WRAPPER_PREFIX, NamedTensors, smallest_inexact
from ema_dist.checkpoint.importing.reference import COUNTER, Reference
from ema_dist.messages import abbreviated, describe_difference
from ema_dist.sharding import has_equal_bits


@dataclass(frozen=True)
class ResolvedAverages:
    """Averages by the names of the model, checked against the reference if there is one."""

    meta: Mapping[str, Tensor]
    """The tensors of the result on the meta device, in the order of the model, each tied tensor once."""
    averages: NamedTensors
    filled: NamedTensors | None
    """The source of the tensors in `meta` that have no average."""
    buffers: frozenset[str] | None
    """The names of buffers; None if neither the file nor a reference distinguishes them from parameters."""
    notes: list[str] = field(default_factory=list)

    @property
    def filled_names(self) -> list[str]:
        """The tensors that have no average."""
        return [name for name in self.meta if name not in self.averages.meta]

    def subset(self, names: Iterable[str]) -> ResolvedAverages:
        """The tensors of these names."""
        meta = {name: self.meta[name] for name in names}
        return ResolvedAverages(meta, self.averages, self.filled, self.buffers, [*self.notes])

    def read(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Yield copies of the tensors of these names, in this order and in the dtypes of `meta`."""
        wanted = list(names)
        averages = self.averages.read([name for name in wanted if name in self.averages.meta])
        others = [name for name in wanted if name not in self.averages.meta]
        filled = self.filled.read(others) if self.filled and others else iter(())
        for name in wanted:
            tensor = next(averages if name in self.averages.meta else filled)
            yield _converted(tensor, self.meta[name].dtype)


def resolve(foreign: ForeignAverages, reference: Reference | None) -> ResolvedAverages:
    """Pair averages with the tensors of ``reference``; tensors without an average are read from the reference.

    Raises: CheckpointError when the averages do not match, or have no names and there is no reference with an order.
    """
    if reference is None:
        if foreign.tensors is None:
            raise CheckpointError(
                f"{foreign.path} lists {len(foreign.listed)} averages without names: expected a reference model, "
                "model.state_dict() in a file by torch.save, to name them (--reference on the command line)"
            )
        tensors = foreign.tensors.renamed(
            {name: name for name in foreign.tensors.meta if name not in foreign.tensors.ties}
        )
        _require_exact_counts(foreign.path, tensors)
        return ResolvedAverages(tensors.meta, tensors, None, foreign.buffers, _tie_notes(foreign.tensors.ties))
    named = _name_by_position(foreign, reference) if foreign.tensors is None else foreign.tensors
    known = reference.tensors.meta
    averages, dropped = _by_first_names(foreign, _with_prefix_of(reference, named), reference)
    _require_match(foreign, averages, reference)
    rounded = _rounded_integers(averages, [name for name in averages.meta if not _is_inexact(known[name])])
    averages = averages.renamed({name: name for name in averages.meta if name not in rounded})
    meta = {
        name: averages.meta[name] if _keeps_dtype(averages.meta.get(name), expected) else expected
        for name, expected in known.items()
    }
    buffers = reference.buffers
    if foreign.buffers is not None and not reference.marks_parameters:
        buffers = (buffers - averages.meta.keys()) | (foreign.buffers & averages.meta.keys())
    resolved = ResolvedAverages(meta, averages, reference.tensors, buffers, _tie_notes(dropped))
    if rounded:
        resolved.notes.append(
            f"integers whose average is a float that may be rounded, or is not finite, are taken from "
            f"{reference.label}: {abbreviated(rounded)}"
        )
    if (names := [name for name in resolved.filled_names if name not in rounded]) and len(names) < len(meta):
        resolved.notes.append(
            f"{len(names)} tensors have no average and are taken from {reference.label}: {abbreviated(names)}"
        )
    return resolved


def _keeps_dtype(average: Tensor | None, expected: Tensor) -> bool:
    """Whether an average is written in its own dtype; tensors that are integers in the model stay integers."""
    return average is not None and _is_inexact(expected)


def _name_by_position(foreign: ForeignAverages, reference: Reference) -> NamedTensors:
    count = len(foreign.listed)
    if not reference.is_ordered:
        raise CheckpointError(
            f"{foreign.path} lists {count} averages without names, which need a reference in the order of the model: "
            f"expected model.state_dict() in a file by torch.save, got {reference.label}, whose format has no order"
        )
    names = reference.parameters
    unmarked = (
        "; the reference does not mark its parameters, so buffers may have been counted as parameters: save "
        "model.state_dict(keep_vars=True) instead"
    )
    hint = "" if reference.marks_parameters else unmarked
    if count != len(names):
        raise CheckpointError(
            f"{foreign.path} lists {count} averages without names, and {reference.label} has {len(names)} parameters "
            f"and {len(reference.buffers)} buffers: they belong to different models{hint}"
        )
    found = [tuple(tensor.shape) for tensor in foreign.listed]
    expected = [tuple(reference.tensors.meta[name].shape) for name in names]
    mismatches = [
        f"{name} (position {position}: {left}, listed {right})"
        for position, (name, left, right) in enumerate(zip(names, expected, found, strict=True))
        if left != right
    ]
    if mismatches:
        raise CheckpointError(
            f"{foreign.path} and {reference.label} differ in the shapes of {len(mismatches)} of {count} parameters: "
            f"{abbreviated(mismatches, limit=3)}{hint}"
        )
    return NamedTensors.of_dictionary(dict(zip(names, foreign.listed, strict=True)))


def _with_prefix_of(reference: Reference, averages: NamedTensors) -> NamedTensors:
    """Restore the prefix ``module.`` if it is the name of a child of the model, not of a wrapper."""
    prefixed = {name: WRAPPER_PREFIX + name for name in averages.meta}
    known = {*reference.tensors.meta, *reference.ties}
    is_child = known.isdisjoint(prefixed) and known.issuperset(prefixed.values())
    return averages.renamed(prefixed) if is_child else averages


def _by_first_names(
    foreign: ForeignAverages, averages: NamedTensors, reference: Reference
) -> tuple[NamedTensors, dict[str, str]]:
    """The averages under the first names of tied tensors, and the first name of each name that is left out."""
    names = {name: name for name in averages.meta}
    dropped: dict[str, str] = {}
    for name, first in _ties(averages, reference).items():
        if name not in averages.meta:
            continue
        if first not in averages.meta:
            names[name] = first
            continue
        if not has_equal_bits(*averages.read([name, first])):
            raise CheckpointError(
                f"{foreign.path} has different averages for {name!r} and {first!r}, which are one tensor in "
                f"{reference.label}: the reference is a different model"
            )
        del names[name]
        dropped[name] = first
    return averages.renamed(names), dropped


def _ties(averages: NamedTensors, reference: Reference) -> dict[str, str]:
    """The ties of the reference, and those ties of the averages of which the reference has only one name."""
    known = reference.tensors.meta
    ties = dict(reference.ties)
    for name, first in averages.ties.items():
        other, kept = (name, first) if name not in known else (first, name)
        if other not in known:
            ties.setdefault(other, kept)
    return ties


def _require_match(foreign: ForeignAverages, averages: NamedTensors, reference: Reference) -> None:
    """Raises: CheckpointError when names, shapes or kinds of dtype differ."""
    expected = reference.tensors.meta
    found = averages.meta
    counts = f"{foreign.path} holds {len(found)} averages, {reference.label} {len(expected)} tensors"
    if found.keys() - expected.keys():
        difference = describe_difference("the file", found.keys(), "the model", expected.keys())
        raise CheckpointError(f"{counts}, and the names differ: {difference}{_prefix_hint(found, expected)}")
    shapes = [
        f"{name} ({tuple(expected[name].shape)}, average {tuple(tensor.shape)})"
        for name, tensor in found.items()
        if tensor.shape != expected[name].shape
    ]
    kinds = [
        f"{name} ({expected[name].dtype}, average {tensor.dtype})"
        for name, tensor in found.items()
        if tensor.is_complex() != expected[name].is_complex() or _is_inexact(expected[name]) > _is_inexact(tensor)
    ]
    for what, mismatches in {"shapes": shapes, "dtypes": kinds}.items():
        if mismatches:
            raise CheckpointError(
                f"{counts}, and the {what} of {len(mismatches)} differ: {abbreviated(mismatches, separator='; ')}"
            )


def _prefix_hint(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What to do if the model is a child of the module that was averaged, such as of a LightningModule."""
    first = next(iter(found))
    for prefix in [first.removesuffix(name) for name in expected if first.endswith(f".{name}")]:
        children = {name.removeprefix(prefix) for name in found if name.startswith(prefix)}
        if children <= expected.keys():
            return (
                f". Names that begin with {prefix!r} match without it: torch.save a file with the averages under those "
                "names, as docs/importing.md shows for EDM, and import that"
            )
    return ""


def _rounded_integers(averages: NamedTensors, names: list[str]) -> list[str]:
    """Those of ``names`` that were integers, and whose stored floats do not tell which."""
    stored = [name for name in names if averages.meta[name].is_floating_point()]
    return [
        name
        for name, tensor in zip(stored, averages.read(stored), strict=True)
        if not (tensor.double().abs() < smallest_inexact(tensor.dtype)).all()
    ]


def _require_exact_counts(path: Path, averages: NamedTensors) -> None:
    """Raises: CheckpointError when a counter of torch's BatchNorm was stored as a float that may be rounded."""
    counters = [name for name in averages.meta if name.rpartition(".")[2] == COUNTER]
    if rounded := _rounded_integers(averages, counters):
        raise CheckpointError(
            f"{path} stores integers as floats that may be rounded, or are not finite: {abbreviated(rounded)}; "
            "expected a reference model, whose values replace them (--reference)"
        )


def _tie_notes(dropped: Mapping[str, str]) -> list[str]:
    pairs = [f"{name} (tied to {first})" for name, first in dropped.items()]
    return [f"second names of tied tensors are left out: {abbreviated(pairs)}"] if pairs else []


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the tensor in ``dtype``; only integers that were stored as floats are cast."""
    if tensor.dtype == dtype:
        return tensor.detach().clone()
    if tensor.is_floating_point() and not dtype.is_floating_point:
        tensor = tensor.double().round()
    return tensor.detach().to(dtype)


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
