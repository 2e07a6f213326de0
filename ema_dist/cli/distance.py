"""How far one tensor is from another, relative to its size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**14
"""Elements that are compared at a time, so few that all stays in the cache of one processor."""


@dataclass(frozen=True)
class Distance:
    """Between a tensor and another of the same shape; equal values are at no distance, NaN and infinities included.

    Every number is relative to the first tensor, by its finite values: 0 for no distance at all, infinite where all of
    them are 0.
    """

    is_equal: bool
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
    is_equal, largest, sums, squares = True, 0.0, [0.0, 0.0], [0.0, 0.0]
    chunks = zip(reference.reshape(-1).split(CHUNK_ELEMENTS), other.reshape(-1).split(CHUNK_ELEMENTS), strict=True)
    for expected, actual in chunks:
        is_equal = is_equal and _equal(expected, actual)
        magnitudes = _magnitudes(_to_double(expected), _to_double(actual))
        largest = _max_or_nan(largest, magnitudes[0].max().item() if magnitudes[0].numel() else 0.0)
        sums = [total + magnitude.sum().item() for total, magnitude in zip(sums, magnitudes, strict=True)]
        squares = [
            total + magnitude.square().sum().item() for total, magnitude in zip(squares, magnitudes, strict=True)
        ]
    mean_size = sums[1] / max(reference.numel(), 1)
    return Distance(is_equal, _ratio(largest, mean_size), _ratio(*sums), _ratio(*map(math.sqrt, squares)))


def _equal(expected: Tensor, actual: Tensor) -> bool:
    """Integers of one dtype are compared as they are: not each of them is a floating number."""
    if expected.dtype == actual.dtype and not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(expected, actual)
    return bool(_equal_or_nan(_to_double(expected), _to_double(actual)).all())


def _equal_or_nan(expected: Tensor, actual: Tensor) -> Tensor:
    return (expected == actual) | (expected.isnan() & actual.isnan())


def _magnitudes(expected: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """The absolute differences, and the absolute values to which they are relative."""
    same = _equal_or_nan(expected, actual)
    return (actual - expected).abs().masked_fill(same, 0), expected.abs().nan_to_num(0, 0, 0)


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _max_or_nan(left: float, right: float) -> float:
    return right if math.isnan(right) or right > left else left


def _ratio(difference: float, size: float) -> float:
    if size == 0:
        return math.inf if difference else 0.0
    return difference / size
