"""Which weight an average gives to each past value: profiles in continuous time, made from laws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ema_dist.posthoc.equations import (
    half_life_cumulative,
    half_life_inner_product,
    power_cumulative,
    power_half_life_inner_product,
    power_inner_product,
    window_cumulative,
)
from ema_dist.schedules.checked_number import checked_number
from ema_dist.schedules.decay import as_schedule
from ema_dist.schedules.equations import half_life_from_decay
from ema_dist.schedules.laws import Constant, HalfLife, Power, Uniform
from ema_dist.schedules.schedule import Schedule


@dataclass(frozen=True)
class Window:
    """The mean of the live weights over the last ``length`` clock units; a target for `fit`.

    Raises: TypeError if ``length`` is not a number, ValueError unless it is positive and finite.
    """

    length: float

    def __post_init__(self) -> None:
        expected = "a positive time, in the unit of the clock"
        length = checked_number("the length of a window", self.length, expected, open_below=True, open_above=True)
        object.__setattr__(self, "length", length)  # frozen


@dataclass(frozen=True)
class PowerProfile:
    """The profile of `Power`, and of `Uniform` with the exponent 0: from the time ``begin`` to ``end``."""

    end: float
    gamma: float
    begin: float = 0.0
    initial_mass: float = 0.0

    def cumulative(self, times: Tensor) -> Tensor:
        """Fraction of the total weight given to values up to each time."""
        return power_cumulative(times, end=self.end, gamma=self.gamma)


@dataclass(frozen=True)
class HalfLifeProfile:
    """The profile of `HalfLife` and of a constant decay: 1/e of the old average is left after the time 1 / ``rate``."""

    end: float
    rate: float
    begin: float = 0.0

    @property
    def initial_mass(self) -> float:
        """Fraction of the total weight given to the initial weights."""
        return math.exp(-self.rate * self.end)

    def cumulative(self, times: Tensor) -> Tensor:
        """Fraction of the total weight given to values up to each time, and the initial weights."""
        return half_life_cumulative(times, end=self.end, rate=self.rate)


@dataclass(frozen=True)
class WindowProfile:
    """The profile of a mean over the last ``length`` clock units."""

    end: float
    length: float
    initial_mass: float = 0.0

    @property
    def begin(self) -> float:
        """The time after which values have a weight."""
        return self.end - self.length

    def cumulative(self, times: Tensor) -> Tensor:
        """Fraction of the total weight given to values up to each time."""
        return window_cumulative(times, end=self.end, length=self.length)


Profile: TypeAlias = PowerProfile | HalfLifeProfile | WindowProfile


def profile_of(law: Schedule | float | Window, end: float) -> Profile:
    """The profile of an average by this law at the time ``end`` since averaging began.

    Raises: ValueError for a law without an exact profile, and for a window that is longer than the time.
    """
    if isinstance(law, Window):
        if law.length > end:
            raise ValueError(
                f"a window of {law.length:g} is longer than the time since averaging began, {end:g}: choose a shorter "
                "window"
            )
        return WindowProfile(end, law.length)
    match as_schedule(law):
        case Power(exponent=gamma):
            return PowerProfile(end, gamma)
        case Uniform():
            return PowerProfile(end, 0.0)
        case HalfLife(value=float() | int() as half_life, ramp=None):
            return _half_life_profile(law, end, half_life)
        case Constant(value=decay):
            return _half_life_profile(law, end, half_life_from_decay(decay))
    raise ValueError(
        f"{law!r} has no exact profile: expected HalfLife without a ramp, Power, Uniform, or a constant decay "
        "applied once per clock unit"
    )


def inner_product(a: Profile, b: Profile) -> float:
    """The integral of the product of two densities, without the point masses for the initial weights."""
    match a, b:
        case PowerProfile(), PowerProfile():
            return power_inner_product(a.end, a.gamma, b.end, b.gamma)
        case HalfLifeProfile(), HalfLifeProfile():
            return half_life_inner_product(a.end, a.rate, b.end, b.rate)
        case PowerProfile(), HalfLifeProfile():
            return power_half_life_inner_product(a.end, a.gamma, b.end, b.rate)
        case WindowProfile(), _:
            # The mean density of ``b`` over the window.
            low, high = b.cumulative(torch.tensor([a.begin, a.end], dtype=torch.float64)).tolist()
            return (high - low) / a.length
    return inner_product(b, a)


def _half_life_profile(law: object, end: float, half_life: float) -> HalfLifeProfile:
    if half_life == 0:
        raise ValueError(
            f"{law!r} keeps only the latest live weights, which is not an average: use checkpoint.merge on live weights"
        )
    return HalfLifeProfile(end, math.log(2) / half_life)
