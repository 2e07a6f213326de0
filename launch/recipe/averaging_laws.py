"""The averaging laws that `--schedule` chooses from."""

from collections.abc import Callable

from ema_dist import Cosine, ExponentialWarmup, HalfLife, InverseGamma, Power, Schedule, Uniform, Warmup

RAMP = 0.09
"""The half-life is at most this fraction of the steps so far; EDM2's value."""

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
"""By name; each takes the half-life in steps, and the number of steps of the run."""

DEFAULT_LAW = "ramped"


def _decay(half_life: float) -> float:
    return 0.5 ** (1 / half_life) if half_life else 0.0
