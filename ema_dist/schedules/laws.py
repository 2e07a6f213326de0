"""The averaging laws as frozen objects that check their arguments; `ema_dist.schedules.equations` has the formulas."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from ema_dist.schedules.arithmetic import Number
from ema_dist.schedules.checked_number import checked_number
from ema_dist.schedules.equations import (
    LARGEST_SIGMA_REL,
    SMALLEST_SIGMA_REL,
    cosine_decay,
    exponential_warmup_decay,
    gamma_from_sigma_rel,
    half_life_decay,
    inverse_gamma_decay,
    power_decay,
    ramped_half_life,
    uniform_decay,
    warmup_decay,
)
from ema_dist.schedules.schedule import ARGUMENT_NAME, describe, fields_of


class _Law:
    """A law whose `repr` is the call that constructs it."""

    def __repr__(self) -> str:
        return describe(type(self).__name__, fields_of(self))


def _argument(name: str) -> Any:  # noqa: ANN401  as dataclasses.field
    """A field whose constructor argument is called ``name``: a field cannot be called ``decay``, as the method is."""
    return field(metadata={ARGUMENT_NAME: name})


def _set(law: _Law, **values: float | None) -> None:
    for name, value in values.items():
        object.__setattr__(law, name, value)  # frozen


def _positive(name: str, value: float, expected: str) -> float:
    return checked_number(name, value, expected, open_below=True, open_above=True)


@dataclass(frozen=True, repr=False, init=False)
class HalfLife(_Law):
    """After this much time, half of the old average is left, however often the average is updated.

    Counted in steps, it is Composer's ``half_life``. Counted in samples or tokens, one half-life fits every batch size
    (Busbridge et al. 2023, arXiv 2307.13813). ``HalfLife(0)`` means no averaging (the average is the last live value),
    ``HalfLife(math.inf)`` means no update (the average is the first live value).

    Args:
        value: the half-life, in optimizer steps or the unit of ``update(elapsed=)``.
        ramp: caps the half-life at this fraction of the time since averaging began, so that the initial weights are
            forgotten early. EDM's ramp-up is ``HalfLife(500_000, ramp=0.05)`` in images, except that EDM uses the time
            before the update; EDM2's ramp is 0.09; torchtitan's default is ``HalfLife(ramp=0.05)``, in updates.

    Raises: TypeError if an argument is not a number, or if both are missing; ValueError if ``value`` is negative or
        NaN, or if ``ramp`` is not positive.
    """

    value: float | None
    ramp: float | None

    def __init__(self, value: float | None = None, /, *, ramp: float | None = None) -> None:
        if value is None and ramp is None:
            raise TypeError(
                "HalfLife needs a value, as in HalfLife(1000), or a ramp, as in HalfLife(ramp=0.05); got neither"
            )
        if value is not None:
            value = checked_number("a half-life", value, "a number >= 0 (steps, or the unit of update(elapsed=))")
        if ramp is not None:
            ramp = checked_number("ramp", ramp, "a positive number, a fraction of the time", open_below=True)
        _set(self, value=value, ramp=ramp)

    def __repr__(self) -> str:
        arguments = [repr(self.value)] if self.value is not None else []
        arguments += [f"ramp={self.ramp!r}"] if self.ramp is not None else []
        return f"{type(self).__name__}({', '.join(arguments)})"

    @property
    def steps(self) -> float | None:
        """Deprecated, and removed in the next version: use `value`."""
        warnings.warn("HalfLife.steps was renamed: use HalfLife.value", DeprecationWarning, stacklevel=2)
        return self.value

    def decay(self, *, time: Number, elapsed: Number, step: Number) -> Number:  # noqa: ARG002  as `Schedule`
        """See `Schedule.decay`."""
        longest = math.inf if self.value is None else self.value
        if longest == 0:
            return 0.0
        half_life = longest if self.ramp is None else ramped_half_life(time=time, half_life=longest, ramp=self.ramp)
        return half_life_decay(elapsed=elapsed, half_life=half_life)


@dataclass(frozen=True, repr=False)
class Constant(_Law):
    """A constant decay per update, independent of the elapsed time; ``decay=0.999`` means ``Constant(0.999)``.

    Known as torch's ``get_ema_multi_avg_fn`` (0.999), Lightning's ``EMAWeightAveraging`` (0.999) and timm's
    ``ModelEmaV3`` (0.9999).

    Raises: TypeError if ``value`` is not a number, ValueError if it is outside [0, 1].
    """

    value: float

    def __post_init__(self) -> None:
        hint = "; for a half-life use HalfLife(steps)"
        _set(self, value=checked_number("decay", self.value, "a number in [0, 1] or a law", highest=1, hint=hint))

    def __repr__(self) -> str:
        return repr(self.value)

    def decay(self, *, time: Number, elapsed: Number, step: Number) -> Number:  # noqa: ARG002  as `Schedule`
        """See `Schedule.decay`."""
        return self.value


@dataclass(frozen=True, repr=False, init=False)
class Power(_Law):
    """Weights past values by a power of their time, so that the width of the average is a fixed fraction of the time.

    Known as EDM2's power-function EMA (Karras et al. 2024), whose tracks are ``sigma_rel`` 0.05 and 0.10.

    Args:
        gamma: the exponent, at least 0.
        sigma_rel: the standard deviation of the profile as a fraction of the training time, from 1e-9 to 12 ** -0.5;
            given instead of ``gamma``.

    Raises: TypeError if an argument is not a number, or unless exactly one is given; ValueError if it is out of range.
    """

    gamma: float | None
    sigma_rel: float | None
    exponent: float = field(init=False, compare=False)
    """The exponent: ``gamma``, or computed from ``sigma_rel``."""

    def __init__(self, *, gamma: float | None = None, sigma_rel: float | None = None) -> None:
        if (gamma is None) == (sigma_rel is None):
            raise TypeError(f"Power needs either gamma or sigma_rel, got gamma={gamma!r}, sigma_rel={sigma_rel!r}")
        if gamma is not None:
            gamma = exponent = checked_number("gamma", gamma, "a finite number >= 0", open_above=True)
        else:
            lowest, highest = SMALLEST_SIGMA_REL, LARGEST_SIGMA_REL
            expected = f"a number from {lowest:g} to 12 ** -0.5 = {highest:.5f}"
            sigma_rel = checked_number("sigma_rel", sigma_rel, expected, lowest=lowest, highest=highest)
            exponent = gamma_from_sigma_rel(sigma_rel)
        _set(self, gamma=gamma, sigma_rel=sigma_rel, exponent=exponent)

    def decay(self, *, time: Number, elapsed: Number, step: Number) -> Number:  # noqa: ARG002  as `Schedule`
        """See `Schedule.decay`."""
        return power_decay(time=time, elapsed=elapsed, gamma=self.exponent)


@dataclass(frozen=True, repr=False)
class Uniform(_Law):
    """The mean of all live values since averaging began, weighted by the time that elapsed before each of them.

    Known as stochastic weight averaging (SWA), Polyak averaging, and with ``start``, tail averaging; it is
    ``Power(gamma=0)``.
    """

    def decay(self, *, time: Number, elapsed: Number, step: Number) -> Number:  # noqa: ARG002  as `Schedule`
        """See `Schedule.decay`."""
        return uniform_decay(time=time, elapsed=elapsed)


@dataclass(frozen=True, repr=False, init=False)
class InverseGamma(_Law):
    """The decay grows as ``1 - (1 + step / inv_gamma) ** -power``, up to ``decay``; it is 0 at the first update.

    Known as ``use_ema_warmup`` of diffusers' ``EMAModel`` and ``use_warmup`` of timm's ``ModelEmaV3``; the law of
    ema-pytorch's ``EMA``.

    Args:
        decay: the largest decay.
        inv_gamma: the larger, the slower the decay grows.
        power: 2/3 suits a million steps or more, 3/4 suits fewer.
        min_decay: the smallest decay after the first update.

    Raises: TypeError if an argument is not a number, ValueError if it is out of range.
    """

    max_decay: float = _argument("decay")
    inv_gamma: float
    power: float
    min_decay: float

    def __init__(
        self, decay: float = 0.9999, inv_gamma: float = 1.0, power: float = 2 / 3, min_decay: float = 0.0
    ) -> None:
        decay = checked_number("decay", decay, "a number in [0, 1]", highest=1)
        _set(
            self,
            max_decay=decay,
            inv_gamma=_positive("inv_gamma", inv_gamma, "a positive number of steps"),
            power=_positive("power", power, "a positive exponent"),
            min_decay=checked_number("min_decay", min_decay, "a number from 0 to decay", highest=decay),
        )

    def decay(self, *, time: Number, elapsed: Number, step: Number) -> Number:  # noqa: ARG002  as `Schedule`
        """See `Schedule.decay`."""
        return inverse_gamma_decay(
            step=step, decay=self.max_decay, inv_gamma=self.inv_gamma, power=self.power, min_decay=self.min_decay
        )


@dataclass(frozen=True, repr=False, init=False)
class Warmup(_Law):
    """The decay grows as ``(1 + step) / (10 + step)``, up to ``decay``; it is 0 at the first update.

    Known as the default of diffusers' ``EMAModel``, and as TensorFlow's ``num_updates``, except that TensorFlow's decay
    is not 0 at the first update.

    Args:
        decay: the largest decay.

    Raises: TypeError if an argument is not a number, ValueError if it is out of range.
    """

    max_decay: float = _argument("decay")

    def __init__(self, decay: float = 0.9999) -> None:
        _set(self, max_decay=checked_number("decay", decay, "a number in [0, 1]", highest=1))

    def decay(self, *, time: Number, elapsed: Number, step: Number) -> Number:  # noqa: ARG002  as `Schedule`
        """See `Schedule.decay`."""
        return warmup_decay(step=step, decay=self.max_decay)


@dataclass(frozen=True, repr=False, init=False)
class ExponentialWarmup(_Law):
    """The decay approaches ``decay`` exponentially, ``decay * (1 - exp(-(step + 1) / tau))``.

    Known as YOLO's ``ModelEMA``.

    Args:
        decay: the final decay.
        tau: the number of steps after which the decay is 63 % of the final one.

    Raises: TypeError if an argument is not a number, ValueError if it is out of range.
    """

    max_decay: float = _argument("decay")
    tau: float

    def __init__(self, decay: float = 0.9999, tau: float = 2000) -> None:
        decay = checked_number("decay", decay, "a number in [0, 1]", highest=1)
        _set(self, max_decay=decay, tau=_positive("tau", tau, "a positive number of steps"))

    def decay(self, *, time: Number, elapsed: Number, step: Number) -> Number:  # noqa: ARG002  as `Schedule`
        """See `Schedule.decay`."""
        return exponential_warmup_decay(step=step, decay=self.max_decay, tau=self.tau)


@dataclass(frozen=True, repr=False)
class Cosine(_Law):
    """The decay goes from ``first`` to ``last`` on half a cosine, and is ``last`` after that.

    Known as the teacher's momentum of BYOL and DINO (0.996 to 1), and of DINOv2 and DINOv3 (0.992 to 1).

    Args:
        first: the decay when averaging begins.
        last: the decay from the time ``total`` on.
        total: the length of the schedule, in steps or the unit of ``update(elapsed=)``.

    Raises: TypeError if an argument is not a number, ValueError if it is out of range.
    """

    first: float
    last: float
    total: float

    def __post_init__(self) -> None:
        first = checked_number("first", self.first, "a number in [0, 1]", highest=1)
        last = checked_number("last", self.last, "a number in [0, 1]", highest=1)
        total = _positive("total", self.total, "a positive number (steps, or the unit of update(elapsed=))")
        _set(self, first=first, last=last, total=total)

    def decay(self, *, time: Number, elapsed: Number, step: Number) -> Number:  # noqa: ARG002  as `Schedule`
        """See `Schedule.decay`."""
        return cosine_decay(time=time, elapsed=elapsed, first=self.first, last=self.last, total=self.total)
