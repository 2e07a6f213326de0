"""``ema-dist diff``: compares the weights of two checkpoints or exports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ema_dist.checkpoint.dcp.metadata import METADATA_FILE
from ema_dist.checkpoint.step_folders import complete_steps, locate
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint, WeightsKind
from ema_dist.checkpoint.weights.files import WeightReader
from ema_dist.cli.distance import Distance, distance
from ema_dist.cli.terminal import progress, stdout_console

MetaTensors: TypeAlias = dict[str, Tensor]
"""Tensors on the meta device, by name."""


@dataclass(frozen=True)
class TensorSource:
    """The full tensors of a checkpoint or an export: the shapes of all, and the values of some, read one at a time."""

    meta_tensors: MetaTensors
    read: Callable[[Iterable[str]], Iterator[Tensor]]


def open_weights(
    path: Path, weights_kind: WeightsKind, *, step: int | None, track: str | None, entry: str | None
) -> TensorSource:
    """Opens the weights in a checkpoint, or those in an export, where the other arguments do not matter.

    Raises: CheckpointError when there are no such weights.
    """
    if not (path / METADATA_FILE).exists() and not complete_steps(path) and path.exists() and step is None:
        files = WeightReader(path)
        meta_tensors = {name: tensor for name, tensor in files.meta_tensors.items() if tensor is not None}
        return TensorSource(meta_tensors, lambda names: (files[name] for name in names))
    stored = StoredCheckpoint(locate(path, step))
    weights = stored.weights(weights_kind, track=track, entry=entry)
    meta_tensors = {name: tensor for name, tensor in stored.meta_tensors(weights).items() if tensor is not None}

    def read(names: Iterable[str]) -> Iterator[Tensor]:
        return (tensor for _, tensor in stored.read_weights(weights.subset(names)))

    return TensorSource(meta_tensors, read)


def diff(a: TensorSource, b: TensorSource) -> bool:
    """Prints how far the weights of ``b`` are from those of ``a``, and returns whether all are equal."""
    mismatches = _mismatches(a.meta_tensors, b.meta_tensors)
    for line in mismatches:
        stdout_console().print(line, markup=False, soft_wrap=True)
    comparable = [
        name
        for name, tensor in a.meta_tensors.items()
        if name in b.meta_tensors and b.meta_tensors[name].shape == tensor.shape
    ]
    distances = dict(_distances(a, b, comparable))
    _print_distances(distances)
    return not mismatches and all(result.is_equal for result in distances.values())


def _mismatches(a: MetaTensors, b: MetaTensors) -> list[str]:
    """One line for each name that only one side has, and for each shape or dtype that differs."""
    lines = [f"only in A: {name}" for name in a if name not in b]
    lines += [f"only in B: {name}" for name in b if name not in a]
    for name in a:
        if name in b:
            for attribute in ("shape", "dtype"):
                left, right = getattr(a[name], attribute), getattr(b[name], attribute)
                if left != right:
                    values = f"{_format_value(left)} in A, {_format_value(right)} in B"
                    lines.append(f"{attribute}s differ: {name}: {values}")
    return lines


def _format_value(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def _distances(a: TensorSource, b: TensorSource, names: list[str]) -> Iterator[tuple[str, Distance]]:
    with progress("comparing", sum(a.meta_tensors[name].nbytes for name in names)) as advance:
        for name, left, right in zip(names, a.read(names), b.read(names), strict=True):
            yield name, distance(left, right)
            advance(left.nbytes)


def _print_distances(distances: dict[str, Distance]) -> None:
    differing = {name: result for name, result in distances.items() if not result.is_equal}
    num_equal = len(distances) - len(differing)
    if differing:
        table = Table(box=SIMPLE_HEAD)
        table.add_column("tensor", overflow="fold")
        table.add_column("largest", justify="right")
        table.add_column("mean", justify="right")
        for name, result in differing.items():
            table.add_row(escape(name), f"{result.largest:.3g}", f"{result.mean:.3g}")
        stdout_console().print(table)
    stdout_console().print(f"{num_equal} of {len(distances)} tensors compared are equal")
