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

from ema_dist.checkpoint.dcp.metadata import METADATA_FILE
from ema_dist.checkpoint.step_folders import complete_steps, locate
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint
from ema_dist.checkpoint.weights.files import WeightFiles
from ema_dist.cli.distance import Distance, distance
from ema_dist.cli.options import EntryOption, TrackOption, WeightsChoice, WeightsOption
from ema_dist.cli.terminal import progress, stdout_console

MetaTensors: TypeAlias = dict[str, Tensor]
"""Tensors on the meta device by name."""


@dataclass(frozen=True)
class TensorSource:
    """Full tensors of a checkpoint or an export: all their shapes, and those asked for by stream."""

    meta_tensors: MetaTensors
    read: Callable[[Iterable[str]], Iterator[Tensor]]


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, or an export (a folder or one file).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    *,
    weights: WeightsOption = WeightsChoice.EMA,
    weights_b: Annotated[
        WeightsChoice | None, typer.Option(help="The same for B; as for A otherwise.", show_default=False)
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
    source_a = _open_source(a, weights, step, track, entry)
    source_b = _open_source(b, weights_b or weights, step_b, track, entry)
    is_different = _show_unpaired(source_a.meta_tensors, source_b.meta_tensors)
    common_names = [
        name
        for name, it in source_a.meta_tensors.items()
        if name in source_b.meta_tensors and source_b.meta_tensors[name].shape == it.shape
    ]
    distances = dict(_distances(source_a, source_b, common_names))
    _show_distances(distances)
    if is_different or not all(it.is_equal for it in distances.values()):
        raise typer.Exit(1)


def _open_source(
    path: Path, weights_kind: WeightsChoice, step: int | None, track: str | None, entry: str | None
) -> TensorSource:
    if not (path / METADATA_FILE).exists() and not complete_steps(path) and path.exists() and step is None:
        files = WeightFiles(path)
        meta_tensors = {name: tensor for name, tensor in files.meta_tensors.items() if tensor is not None}
        return TensorSource(meta_tensors, lambda names: (files[name] for name in names))
    stored = StoredCheckpoint(locate(path, step))
    weights = stored.weights(weights_kind.value, track=track, entry=entry)
    meta_tensors = {name: tensor for name, tensor in stored.meta_tensors(weights).items() if tensor is not None}

    def read(names: Iterable[str]) -> Iterator[Tensor]:
        return (tensor for _, tensor in stored.read_weights(weights.subset(names)))

    return TensorSource(meta_tensors, read)


def _show_unpaired(tensors_a: MetaTensors, tensors_b: MetaTensors) -> bool:
    """Names that only one side has, shapes and dtypes that differ; whether there are any."""
    lines = [f"only in A: {name}" for name in tensors_a if name not in tensors_b]
    lines += [f"only in B: {name}" for name in tensors_b if name not in tensors_a]
    for name in tensors_a:
        if name in tensors_b:
            for what in ("shape", "dtype"):
                left, right = getattr(tensors_a[name], what), getattr(tensors_b[name], what)
                if left != right:
                    lines.append(f"{what}s differ: {name}: {_format_value(left)} in A, {_format_value(right)} in B")
    for line in lines:
        stdout_console().print(line, markup=False, soft_wrap=True)
    return bool(lines)


def _format_value(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def _distances(source_a: TensorSource, source_b: TensorSource, names: list[str]) -> Iterator[tuple[str, Distance]]:
    with progress("comparing", sum(source_a.meta_tensors[name].nbytes for name in names)) as advance:
        for name, left, right in zip(names, source_a.read(names), source_b.read(names), strict=True):
            yield name, distance(left, right)
            advance(left.nbytes)


def _show_distances(distances: dict[str, Distance]) -> None:
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
