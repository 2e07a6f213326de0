"""The relative distance of two tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**14
"""Elements compared at a time: the temporaries fit into the cache of one core."""


@dataclass(frozen=True)
class Distance:
    """The distance of a tensor from a reference of the same shape; equal NaN and equal infinities have distance 0.

    Each number is divided by the size of the reference, over its finite values. It is 0 if the difference is 0, and
    otherwise infinite if the size is 0.
    """

    is_equal: bool
    """Whether all values are equal. The numbers below cannot show it, because differences may underflow or overflow."""
    largest: float
    """The largest absolute difference, over the mean absolute value."""
    mean: float
    """The mean absolute difference, over the mean absolute value."""
    norm: float
    """The Euclidean norm of the difference, over that of the reference."""


def distance(reference: Tensor, other: Tensor) -> Distance:
    """Returns the distance of ``other`` from ``reference``, computed in double precision.

    Memory: bounded by a constant.
    Shape: the same for both.
    """
    assert reference.shape == other.shape, "the caller compares shapes"
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
    """Compares integers of one dtype exactly, because float64 cannot represent every int64."""
    if expected.dtype == actual.dtype and not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(expected, actual)
    return bool(_equal_or_nan(_to_double(expected), _to_double(actual)).all())


def _equal_or_nan(expected: Tensor, actual: Tensor) -> Tensor:
    return (expected == actual) | (expected.isnan() & actual.isnan())


def _magnitudes(expected: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """The absolute differences, and the absolute values of the reference, with 0 for those that are not finite."""
    is_same = _equal_or_nan(expected, actual)  # the difference of two infinities is NaN
    return (actual - expected).abs().masked_fill(is_same, 0), expected.abs().nan_to_num(0, 0, 0)


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _max_or_nan(left: float, right: float) -> float:
    return right if math.isnan(right) or right > left else left


def _ratio(difference: float, size: float) -> float:
    if size == 0:
        return math.inf if difference else 0.0
    return difference / size
