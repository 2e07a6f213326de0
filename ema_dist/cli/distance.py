"""How far one tensor is from another, relative to its size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**14
"""Elements that are compared at a time, so few that all stays in the cache of one processor."""


@dataclass(frozen=True)
class Distance:
    """Between a tensor and another of the same shape; equal values are at no distance, NaN and infinities included.

    Every number is relative to the first tensor, by its finite values: 0 for no distance at all, infinite where all of
    them are 0.
    """

    equal: bool
    """Whether every value is equal: a difference may be too small for the numbers below, and too large."""
    largest: float
    """The largest absolute difference, by the mean absolute value."""
    mean: float
    """The mean absolute difference, by the mean absolute value."""
    norm: float
    """The Euclidean norm of the difference, by the Euclidean norm."""


def distance(reference: Tensor, other: Tensor) -> Distance:
    """How far ``other`` is from ``reference``, computed in double precision.

    Memory: a constant.
    Shape: both the same.
    """
    assert reference.shape == other.shape, "shapes are compared before"
    equal, largest, totals, squares = True, 0.0, [0.0, 0.0], [0.0, 0.0]
    chunks = zip(reference.reshape(-1).split(CHUNK), other.reshape(-1).split(CHUNK), strict=True)
    for expected, found in chunks:
        equal = equal and _equal(expected, found)
        sizes = _sizes(_wide(expected), _wide(found))
        largest = _larger(largest, sizes[0].max().item() if sizes[0].numel() else 0.0)
        totals = [total + size.sum().item() for total, size in zip(totals, sizes, strict=True)]
        squares = [total + size.square().sum().item() for total, size in zip(squares, sizes, strict=True)]
    mean_size = totals[1] / max(reference.numel(), 1)
    return Distance(equal, _ratio(largest, mean_size), _ratio(*totals), _ratio(*map(math.sqrt, squares)))


def _equal(expected: Tensor, found: Tensor) -> bool:
    """Integers of one dtype are compared as they are: not each of them is a floating number."""
    if expected.dtype == found.dtype and not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(expected, found)
    return bool(_same(_wide(expected), _wide(found)).all())


def _same(expected: Tensor, found: Tensor) -> Tensor:
    return (expected == found) | (expected.isnan() & found.isnan())


def _sizes(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """The absolute differences, and the absolute values to which they are relative."""
    same = _same(expected, found)
    return (found - expected).abs().masked_fill(same, 0), expected.abs().nan_to_num(0, 0, 0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _larger(left: float, right: float) -> float:
    return right if math.isnan(right) or right > left else left


def _ratio(difference: float, size: float) -> float:
    if size == 0:
        return math.inf if difference else 0.0
    return difference / size
