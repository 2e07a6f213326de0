"""``ema-dist diff``: compares the weights of two checkpoints or exports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ema_dist.checkpoint.weighted_sum.source import WeightSource
from ema_dist.cli.distance import Distance, distance
from ema_dist.cli.terminal import print_json, print_table, progress, stdout_console

MetaTensors: TypeAlias = dict[str, Tensor]
"""Tensors on the meta device, by name."""


def diff(a: WeightSource, b: WeightSource, *, rtol: float | None = None, as_json: bool = False) -> bool:
    """Prints how far the weights of ``b`` are from those of ``a``, and returns whether all are equal.

    Args:
        rtol: the largest distance at which tensors count as equal, whatever their dtypes; None if they must be
            bit-identical or both NaN, and of one dtype.
    """
    left, right = a.meta_tensors, b.meta_tensors
    only_in_a = [name for name in left if name not in right]
    only_in_b = [name for name in right if name not in left]
    shapes = _differing(left, right, lambda tensor: list(tensor.shape))
    dtypes = _differing(left, right, lambda tensor: str(tensor.dtype).removeprefix("torch."))
    comparable = [name for name in left if name in right and name not in shapes]
    distances = dict(_distances(a, b, comparable))
    differing = {
        name: result
        for name, result in distances.items()
        if not result.is_equal and (rtol is None or not result.largest <= rtol)
    }
    is_equal = not (only_in_a or only_in_b or shapes or differing or (dtypes and rtol is None))
    if as_json:
        tensors = {name: {**asdict(result), "differs": name in differing} for name, result in distances.items()}
        print_json(
            {"equal": is_equal, "only_in_a": only_in_a, "only_in_b": only_in_b, "shapes": shapes, "dtypes": dtypes}
            | {"tensors": tensors}
        )
        return is_equal
    lines = [f"only in A: {name}" for name in only_in_a] + [f"only in B: {name}" for name in only_in_b]
    for what, values in {"shapes": shapes, "dtypes": dtypes}.items():
        lines += [f"{what} differ: {name}: {in_a} in A, {in_b} in B" for name, (in_a, in_b) in values.items()]
    for line in lines:
        stdout_console().print(line, markup=False, soft_wrap=True)
    _print_distances(differing, num_compared=len(distances), rtol=rtol)
    return is_equal


def _differing(a: MetaTensors, b: MetaTensors, attribute: Callable[[Tensor], Any]) -> dict[str, list[Any]]:
    """The values of an attribute in A and in B, by the names of the tensors where they differ."""
    values = {name: [attribute(a[name]), attribute(b[name])] for name in a if name in b}
    return {name: [in_a, in_b] for name, (in_a, in_b) in values.items() if in_a != in_b}


def _distances(a: WeightSource, b: WeightSource, names: list[str]) -> Iterator[tuple[str, Distance]]:
    with progress("comparing", sum(a.meta_tensors[name].nbytes for name in names)) as advance:
        for name, left, right in zip(names, a.read_cast(names), b.read_cast(names), strict=True):
            yield name, distance(left, right)
            advance(left.nbytes)


def _print_distances(differing: dict[str, Distance], *, num_compared: int, rtol: float | None) -> None:
    if differing:
        table = Table(box=SIMPLE_HEAD)
        table.add_column("tensor")
        table.add_column("largest", justify="right")
        table.add_column("mean", justify="right")
        for name, result in differing.items():
            table.add_row(escape(name), f"{result.largest:.3g}", f"{result.mean:.3g}")
        print_table(table)
    within = "" if rtol is None else f" within {rtol:g} of the mean absolute value in A"
    stdout_console().print(
        f"{num_compared - len(differing)} of {num_compared} tensors compared are equal{within}", soft_wrap=True
    )
