"""The averaging laws that `--schedule` chooses from."""

import math
from collections.abc import Callable

from ema_dist import Cosine, ExponentialWarmup, HalfLife, InverseGamma, Power, Schedule, Uniform, Warmup

from .script import UsageError

RAMP = 0.09
"""Caps the half-life at this fraction of the steps so far; EDM2's value."""

LAWS: dict[str, Callable[[float, int], Schedule]] = {
    "ramped": lambda half_life, _: HalfLife(half_life, ramp=RAMP),
    "half-life": lambda half_life, _: HalfLife(half_life),
    "power": lambda _half_life, _steps: Power(sigma_rel=0.1),
    "uniform": lambda _half_life, _steps: Uniform(),
    "inverse-gamma": lambda half_life, _: InverseGamma(_decay(half_life)),
    "warmup": lambda half_life, _: Warmup(_decay(half_life)),
    "exponential-warmup": lambda half_life, _: ExponentialWarmup(_decay(half_life), tau=2 * half_life),
    "cosine": lambda half_life, steps: Cosine(_decay(half_life), 1, steps),
}
"""Constructors of the laws, by name. Each takes the half-life in steps and the number of steps of the run."""

DEFAULT_LAW = "ramped"
DEFAULT_HALF_LIFE = 60.0
WITHOUT_HALF_LIFE = {"power", "uniform"}


def make_law(name: str, half_life: float | None, steps: int) -> Schedule:
    """The law that the options ask for.

    Args:
        name: a key of `LAWS`.
        half_life: in steps; None for `DEFAULT_HALF_LIFE`.
        steps: the number of steps of the run.

    Raises: UsageError for a half-life that is out of range, or that this law does not have.
    """
    if half_life is not None and name in WITHOUT_HALF_LIFE:
        raise UsageError(f"--half-life has no effect with --schedule {name}: remove it")
    if half_life is not None and not 0 < half_life < math.inf:
        raise UsageError(f"--half-life must be a positive, finite number of steps, got {half_life:g}")
    return LAWS[name](DEFAULT_HALF_LIFE if half_life is None else half_life, steps)


def _decay(half_life: float) -> float:
    return 0.5 ** (1 / half_life)
