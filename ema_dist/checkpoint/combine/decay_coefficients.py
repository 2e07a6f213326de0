"""Coefficients for merging checkpoints of a constant learning rate, so that they emulate its decay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import cos, fsum, isfinite, pi, sqrt
from typing import Literal

DecayShape = Literal["linear", "1-sqrt", "cosine"]

LARGEST_SUM_ERROR = 1e-6
"""How far the sum of coefficients may be from 1."""


def linear(x: float) -> float:
    """Learning rate at fraction ``x`` of a linear decay from 1 to 0."""
    return 1 - x


def one_minus_sqrt(x: float) -> float:
    """Learning rate at fraction ``x`` of a decay from 1 to 0 that is fast at first.

    Source: Hägele et al. 2024, arXiv 2405.18392.
    """
    return 1 - sqrt(x)


def cosine(x: float) -> float:
    """Learning rate at fraction ``x`` of a decay from 1 to 0 along half a cosine.

    Source: Loshchilov and Hutter 2017, arXiv 1608.03983.
    """
    return (1 + cos(pi * x)) / 2


DECAY_SHAPES: dict[DecayShape, Callable[[float], float]] = {
    "linear": linear,
    "1-sqrt": one_minus_sqrt,
    "cosine": cosine,
}


def uniform_coefficients(count: int) -> list[float]:
    """Coefficients of the mean of ``count`` checkpoints.

    Source: PMA, Li et al. 2025, arXiv 2505.12082.
    """
    return [1 / count] * count


def decay_coefficients(shape: DecayShape, count: int) -> list[float]:
    """Coefficients, oldest first, with which ``count`` checkpoints emulate a decay of the learning rate over them.

    A checkpoint is the oldest one plus all updates since. The merge takes the i-th update with the weight
    ``w_i = shape(i / count)`` that a decay would give it, which makes ``c_0 = 1 - w_1``, ``c_j = w_j - w_(j+1)`` and
    ``c_k = w_k`` for the checkpoints 0 to k. A linear decay is the uniform mean.

    Raises: ValueError for an unknown shape.
    Source: WSM, Tian et al. 2025, arXiv 2507.17634, theorem 3.1.
    """
    if shape not in DECAY_SHAPES:
        raise ValueError(f"emulate_decay must be one of {', '.join(DECAY_SHAPES)}, got {shape!r}")
    weights = [1.0, *(DECAY_SHAPES[shape](index / count) for index in range(1, count)), 0.0]
    return [weight - following for weight, following in pairwise(weights)]


def check_coefficients(coefficients: Sequence[float], count: int) -> list[float]:
    """Return the coefficients. Raises: ValueError unless there are ``count`` finite ones, whose sum is 1."""
    if len(coefficients) != count:
        raise ValueError(
            f"expected {count} coefficients, one for each checkpoint in the order of the checkpoints, got "
            f"{len(coefficients)}"
        )
    if not all(map(isfinite, coefficients)) or abs(fsum(coefficients) - 1) > LARGEST_SUM_ERROR:
        raise ValueError(
            f"expected coefficients whose sum is 1 within {LARGEST_SUM_ERROR:g}, got {[*coefficients]}, whose sum is "
            f"{fsum(coefficients):.9g}"
        )
    return [*coefficients]
