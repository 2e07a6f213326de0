"""The numeric arguments of diffusers' EMAModel, as an averaging law and a starting step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ema_dist.schedules.arithmetic import Number, maximum
from ema_dist.schedules.checked_number import checked_number
from ema_dist.schedules.decay import DecayRecord
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


@dataclass(frozen=True)
class DecaySettings:
    """The arguments of diffusers' EMAModel from which it computes its decay, under its names.

    Raises: TypeError for an argument of another type; ValueError for a number out of range.
    """

    decay: float
    min_decay: float
    update_after_step: int
    use_ema_warmup: bool
    inv_gamma: float
    power: float

    def __post_init__(self) -> None:
        if not isinstance(self.use_ema_warmup, bool):
            raise TypeError(f"use_ema_warmup must be True or False, got {self.use_ema_warmup!r}")
        if not isinstance(self.update_after_step, int):
            raise TypeError(f"update_after_step must be an integer, got {self.update_after_step!r}")
        checked_number("update_after_step", self.update_after_step, "an integer >= 0")
        decay = checked_number("decay", self.decay, "a number in [0, 1]", highest=1)
        min_decay = checked_number("min_decay", self.min_decay, "a number from 0 to decay", highest=decay)
        # diffusers' own load_state_dict() takes only floats for min_decay.
        object.__setattr__(self, "decay", float(decay))
        object.__setattr__(self, "min_decay", float(min_decay))
        self.make_law()  # checks inv_gamma and power

    def updated(self, state: Mapping[str, Any]) -> DecaySettings:
        """These settings, replaced by those in a state of EMAModel, which may be incomplete."""
        return DecaySettings(**{field.name: state.get(field.name, getattr(self, field.name)) for field in fields(self)})

    def as_dict(self) -> dict[str, Any]:
        """The settings as diffusers stores them."""
        return asdict(self)

    def make_law(self) -> Schedule:
        """The law whose decays are those of diffusers, with ``start=update_after_step``."""
        warmup = InverseGamma(self.decay, self.inv_gamma, self.power, self.min_decay)
        if self.use_ema_warmup:
            return warmup
        return BoundedWarmup(self.decay, self.min_decay) if self.min_decay else Warmup(self.decay)

    def decay_at(self, optimization_step: int) -> float:
        """The factor of the old average at a step, counted from 1; 0 if the step copies the live weights."""
        step = optimization_step - self.update_after_step - 1
        return float(self.make_law().decay(time=step + 1, elapsed=1, step=step)) if step > 0 else 0.0

    def decay_entry(self, optimization_step: int) -> dict[str, str]:
        """The ``decay`` entry of a state of `ShardedEMA` after that many steps."""
        start = min(optimization_step, self.update_after_step)
        clock = {
            "steps": optimization_step,
            "time": optimization_step,
            "start_step": start,
            "start_time": start,
            "last_update": optimization_step,
            "initial_mass": float(optimization_step <= self.update_after_step),  # the first update copies
            "last_decay": self.decay_at(optimization_step),
        }
        law = DecayRecord.of_law(self.make_law())
        return DecayRecord(law.kind, law.fields, clock).state()
