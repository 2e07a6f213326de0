"""The averaging law of diffusers' EMAModel, from its arguments."""

from __future__ import annotations

from dataclasses import dataclass

from ema_dist.schedules.arithmetic import Number, maximum
from ema_dist.schedules.equations import warmup_decay, zero_at_first_step
from ema_dist.schedules.laws import InverseGamma, Warmup
from ema_dist.schedules.schedule import Schedule


@dataclass(frozen=True)
class BoundedWarmup:
    """`Warmup` that is at least ``min_decay`` after the first update.

    Args:
        max_decay: the largest decay.
        min_decay: the smallest decay after the first update.
    """

    max_decay: float
    min_decay: float

    def decay(self, *, time: Number, elapsed: Number, step: Number) -> Number:  # noqa: ARG002  as `Schedule`
        """See `Schedule.decay`."""
        return zero_at_first_step(step) * maximum(warmup_decay(step=step, decay=self.max_decay), self.min_decay)


def diffusers_law(*, decay: float, min_decay: float, use_ema_warmup: bool, inv_gamma: float, power: float) -> Schedule:
    """The law with the decays of diffusers' EMAModel that has these arguments; it starts at ``update_after_step``.

    Raises: TypeError if an argument is not a number, ValueError if it is out of range.
    """
    warmup = InverseGamma(decay, inv_gamma, power, min_decay)  # checks all arguments
    if use_ema_warmup:
        return warmup
    return BoundedWarmup(decay, min_decay) if min_decay else Warmup(decay)
