"""The numeric arguments of diffusers' EMAModel, as an averaging law and a starting step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ema_dist.schedules.checked_number import checked_number
from ema_dist.schedules.decay import record_counts
from ema_dist.schedules.diffusers_law import diffusers_law
from ema_dist.schedules.schedule import Schedule


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
        """A copy with the settings in a state of EMAModel; settings that the state lacks do not change."""
        return DecaySettings(**{field.name: state.get(field.name, getattr(self, field.name)) for field in fields(self)})

    def as_dict(self) -> dict[str, Any]:
        """The settings as diffusers stores them."""
        return asdict(self)

    def make_law(self) -> Schedule:
        """The law whose decays are those of diffusers, with ``start=update_after_step``."""
        return diffusers_law(
            decay=self.decay,
            min_decay=self.min_decay,
            use_ema_warmup=self.use_ema_warmup,
            inv_gamma=self.inv_gamma,
            power=self.power,
        )

    def decay_at(self, optimization_step: int) -> float:
        """The factor of the old average at a step, counted from 1; 0 if the step copies the live weights."""
        step = optimization_step - self.update_after_step - 1
        return float(self.make_law().decay(time=step + 1, elapsed=1, step=step)) if step > 0 else 0.0

    def decay_entry(self, optimization_step: int) -> dict[str, str]:
        """The ``decay`` entry of a state of `ShardedEMA` after that many steps."""
        has_average = optimization_step > self.update_after_step
        record = record_counts(
            self.make_law(), steps=optimization_step, start=self.update_after_step, has_average=has_average
        )
        return record.state()
