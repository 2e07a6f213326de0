"""Profiles as equations: cumulative weights and inner products of densities.

A profile has a density over the time since averaging began, plus a point mass for the initial weights. It ends at the
time of the last update. Its integral over one step is exactly the weight that the recursion gives to that step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

QUADRATURE_STEP = 1 / 16
QUADRATURE_RANGE = 4.0
"""The trapezoidal rule of `_integral` covers [-4, 4]; at both ends its weights are below 1e-30."""

NEGLIGIBLE_EXPONENT = 50.0
"""exp(-50) is below the rounding of a float64 sum."""


def power_cumulative(times: Tensor, *, end: float, gamma: float) -> Tensor:
    """The fraction of its total weight that a power average gives to values up to each time.

    It is ``(time / end) ** (gamma + 1)``.

    Source: the integral of Karras et al. 2024 (EDM2, arXiv 2312.02696), eq. 121.
    """
    return (times / end).clamp(max=1.0) ** (gamma + 1)


def half_life_cumulative(times: Tensor, *, end: float, rate: float) -> Tensor:
    """The fraction of its total weight that an exponential average gives to initial weights and values up to each time.

    Source: the product of ``exp(-rate * elapsed)`` over the updates from each time to ``end``.
    """
    return torch.exp(-rate * (end - times).clamp(min=0.0))


def window_cumulative(times: Tensor, *, end: float, length: float) -> Tensor:
    """The fraction of its total weight that the mean over ``(end - length, end]`` gives to values up to each time.

    Source: the integral of the constant density ``1 / length``.
    """
    return ((times - (end - length)) / length).clamp(0.0, 1.0)


def power_inner_product(end_a: float, gamma_a: float, end_b: float, gamma_b: float) -> float:
    """The integral of the product of two power densities.

    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), eq. 151.
    """
    exponent = gamma_b if end_a < end_b else -gamma_a
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (end_a / end_b) ** exponent / max(end_a, end_b)


def half_life_inner_product(end_a: float, rate_a: float, end_b: float, rate_b: float) -> float:
    """The integral of the product of two exponential densities, ``rate * exp(-rate * (end - time))``, over time > 0.

    Source: the antiderivative of the product, from 0 to the earlier end.
    """
    if rate_a == 0 or rate_b == 0:
        return 0.0
    overlap = min(end_a, end_b)
    at_overlap = math.exp(-rate_a * (end_a - overlap) - rate_b * (end_b - overlap))
    return rate_a * rate_b / (rate_a + rate_b) * at_overlap * -math.expm1(-(rate_a + rate_b) * overlap)


def power_half_life_inner_product(power_end: float, gamma: float, half_life_end: float, rate: float) -> float:
    """The integral of the product of a power density and an exponential one, by quadrature.

    With ``v`` the distance from the end of the overlap, as a fraction of the overlap, the integrand is
    ``(1 - v) ** gamma * exp(-x * v)``: Kummer's function M(1, gamma + 2, -x) / (gamma + 1), DLMF 13.4.1.
    """
    overlap = min(power_end, half_life_end)
    x = rate * overlap
    upper = min(1.0, NEGLIGIBLE_EXPONENT / (x + gamma)) if x + gamma > 0 else 1.0
    kummer = _integral(lambda v: (1 - v) ** gamma * math.exp(-x * v), upper)
    ratio = (overlap / power_end) ** (gamma + 1)
    return (gamma + 1) * ratio * rate * math.exp(-rate * (half_life_end - overlap)) * kummer


def _integral(function: Callable[[float], float], upper: float) -> float:
    """The integral over (0, upper); singular derivatives at the bounds do no harm.

    Source: Takahasi and Mori 1974, the double exponential (tanh-sinh) formula.
    """
    count = round(QUADRATURE_RANGE / QUADRATURE_STEP)
    total = 0.0
    for index in range(-count, count + 1):
        position = index * QUADRATURE_STEP
        angle = math.pi / 2 * math.sinh(position)
        weight = math.pi / 4 * math.cosh(position) / math.cosh(angle) ** 2
        total += weight * function(upper / (1 + math.exp(-2 * angle)))
    return total * upper * QUADRATURE_STEP
