"""Every averaging law with its formula, written independently of the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ema_dist import Cosine, ExponentialWarmup, HalfLife, InverseGamma, Power, Schedule, Uniform, Warmup

POWER_OF_TEN_PERCENT = 6.937203937601806
"""The exponent whose profile has a standard deviation of a tenth of the time (Karras et al. 2024, Alg. 2)."""


class Formula(NamedTuple):
    """A law, and the weight of the live value at one update from t, d and k."""

    law: Schedule | float
    weight: Callable[[float, float, int], float]


def _inverse_gamma(k: int, largest: float, inv_gamma: float, power: float, smallest: float) -> float:
    return 1.0 if k == 0 else 1 - min(max(1 - (1 + k / inv_gamma) ** -power, smallest), largest)


FORMULAS: dict[str, Formula] = {
    "half_life": Formula(HalfLife(60), lambda _t, d, _k: 1 - 2 ** (-d / 60)),
    "ramped": Formula(HalfLife(60, ramp=0.5), lambda t, d, _k: 1 - 2 ** (-d / min(60, 0.5 * t))),
    "ramp": Formula(HalfLife(ramp=0.05), lambda t, d, _k: 1 - 2 ** (-d / (0.05 * t))),
    "number": Formula(0.75, lambda _t, _d, _k: 0.25),
    "gamma": Formula(Power(gamma=2), lambda t, d, _k: 1 - (1 - d / t) ** 3),
    "sigma_rel": Formula(Power(sigma_rel=0.1), lambda t, d, _k: 1 - (1 - d / t) ** (POWER_OF_TEN_PERCENT + 1)),
    "uniform": Formula(Uniform(), lambda t, d, _k: d / t),
    "inverse_gamma": Formula(
        InverseGamma(0.9, 2.0, 0.75, 0.1), lambda _t, _d, k: _inverse_gamma(k, 0.9, 2.0, 0.75, 0.1)
    ),
    "warmup": Formula(Warmup(0.7), lambda _t, _d, k: 1.0 if k == 0 else 1 - min(0.7, (1 + k) / (10 + k))),
    "exponential": Formula(ExponentialWarmup(0.9, 20), lambda _t, _d, k: 1 - 0.9 * (1 - math.exp(-(k + 1) / 20))),
    "cosine": Formula(
        # BYOL (Grill et al. 2020): the weight is (1 - tau_base) (cos(pi k / K) + 1) / 2 for a decay that ends at 1.
        Cosine(0.5, 1.0, 50),
        lambda t, d, _k: 0.5 * (math.cos(math.pi * min(t - d, 50) / 50) + 1) / 2,
    ),
}

LAWS: dict[str, Any] = {name: formula.law for name, formula in FORMULAS.items()}


class Update(NamedTuple):
    """What a step does to the average: nothing, copy the live weights, or an update with t, d and k."""

    is_following: bool
    arguments: tuple[float, float, int] | None

    def weight(self, formula: Formula) -> float:
        """The weight of the live value."""
        return formula.weight(*self.arguments) if self.arguments else float(self.is_following)


def expected_updates(elapsed: list[float], *, start: float, interval: int) -> Iterator[Update]:
    """The steps of a run, from the definitions of t, d and k."""
    times = [sum(elapsed[: step + 1]) for step in range(len(elapsed))]
    followed = [step for step, time in enumerate(times, 1) if time <= start]
    began, began_at = (followed[-1], times[followed[-1] - 1]) if followed else (0, 0.0)
    due = [step for step in range(began + 1, len(times) + 1) if step % interval == 0]
    previous = began_at
    for step, time in enumerate(times, 1):
        if step in due:
            yield Update(is_following=False, arguments=(time - began_at, time - previous, step - 1 - began))
            previous = time
        else:
            yield Update(is_following=step <= began, arguments=None)
