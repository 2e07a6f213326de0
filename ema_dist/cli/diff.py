"""``ema-dist diff``: how far the weights of one checkpoint or export are from those of another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ema_dist.checkpoint.dcp.metadata import METADATA
from ema_dist.checkpoint.folders import complete_steps, locate
from ema_dist.checkpoint.stored_checkpoint import Stored
from ema_dist.checkpoint.weights.files import WeightFiles
from ema_dist.cli.distance import Distance, distance
from ema_dist.cli.options import EntryOption, TrackOption, Which, WhichOption
from ema_dist.cli.terminal import output, progress

Shapes: TypeAlias = dict[str, Tensor]
"""Tensors on the meta device by name."""


@dataclass(frozen=True)
class Side:
    """Full tensors of a checkpoint or an export: all their shapes, and those asked for by stream."""

    shapes: Shapes
    read: Callable[[Iterable[str]], Iterator[Tensor]]


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, or an export (a folder or one file).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    *,
    weights: WhichOption = Which.EMA,
    weights_b: Annotated[
        Which | None, typer.Option(help="The same for B; as for A otherwise.", show_default=False)
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Of A, if that is a root of checkpoints.", show_default=False)
    ] = None,
    step_b: Annotated[int | None, typer.Option(help="Of B, if that is one.", show_default=False)] = None,
    track: TrackOption = None,
    entry: EntryOption = None,
) -> None:
    """Show how far the weights of B are from those of A, tensor by tensor, and what only one of them has.

    Relative to A: the largest distance is max |b - a| / mean |a|, the mean one is mean |b - a| / mean |a|.

    Exit codes are those of diff(1): 0 when all is equal, 1 when something differs, 2 when they cannot be compared.
    """
    ours = _open(a, weights, step, track, entry)
    theirs = _open(b, weights_b or weights, step_b, track, entry)
    different = _show_unpaired(ours.shapes, theirs.shapes)
    pairs = [
        name for name, it in ours.shapes.items() if name in theirs.shapes and theirs.shapes[name].shape == it.shape
    ]
    distances = dict(_distances(ours, theirs, pairs))
    _show_distances(distances)
    if different or not all(it.equal for it in distances.values()):
        raise typer.Exit(1)


def _open(path: Path, which: Which, step: int | None, track: str | None, entry: str | None) -> Side:
    if not (path / METADATA).exists() and not complete_steps(path) and path.exists() and step is None:
        files = WeightFiles(path)
        shapes = {name: it for name, it in files.shapes.items() if it is not None}
        return Side(shapes, lambda names: (files[name] for name in names))
    stored = Stored(locate(path, step))
    weights = stored.weights(which.value, track=track, entry=entry)
    shapes = {name: it for name, it in stored.shapes(weights).items() if it is not None}

    def read(names: Iterable[str]) -> Iterator[Tensor]:
        return (tensor for _, tensor in stored.read_weights(weights.only(names)))

    return Side(shapes, read)


def _show_unpaired(ours: Shapes, theirs: Shapes) -> bool:
    """Names that only one side has, shapes and dtypes that differ; whether there are any."""
    lines = [f"only in A: {name}" for name in ours if name not in theirs]
    lines += [f"only in B: {name}" for name in theirs if name not in ours]
    for name in ours:
        if name in theirs:
            for what in ("shape", "dtype"):
                left, right = getattr(ours[name], what), getattr(theirs[name], what)
                if left != right:
                    lines.append(f"{what}s differ: {name}: {_written(left)} in A, {_written(right)} in B")
    for line in lines:
        output().print(line, markup=False, soft_wrap=True)
    return bool(lines)


def _written(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def _distances(ours: Side, theirs: Side, names: list[str]) -> Iterator[tuple[str, Distance]]:
    with progress("comparing", sum(ours.shapes[name].nbytes for name in names)) as advance:
        for name, left, right in zip(names, ours.read(names), theirs.read(names), strict=True):
            yield name, distance(left, right)
            advance(left.nbytes)


def _show_distances(distances: dict[str, Distance]) -> None:
    apart = {name: it for name, it in distances.items() if not it.equal}
    equal = len(distances) - len(apart)
    if apart:
        table = Table(box=SIMPLE_HEAD)
        table.add_column("tensor", overflow="fold")
        table.add_column("largest", justify="right")
        table.add_column("mean", justify="right")
        for name, far in apart.items():
            table.add_row(escape(name), f"{far.largest:.3g}", f"{far.mean:.3g}")
        output().print(table)
    output().print(f"{equal} of {len(distances)} tensors compared are equal")
