"""When an average is taken and with which weight, also when only the device knows which steps were skipped."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ema_dist.schedules.arithmetic import Number, Truth, as_number, where
from ema_dist.schedules.checked_number import checked_number
from ema_dist.schedules.schedule import Schedule


class Reading(NamedTuple):
    """What the clock shows. Values that depend on a step which only the device knows are 0-d tensors there."""

    steps: Number
    """Optimizer steps, without skipped ones."""
    updates: Number
    """Averages taken, not counting the steps until `Clock.start`."""
    time: Number
    """What has elapsed."""
    start_step: Number
    """The last step at which the averages just followed the live weights; averaging began there."""
    start_time: Number
    """The time of that step."""
    last_update: Number
    """The time of the last update, or at which averaging began."""
    initial_masses: Mapping[str, Number]
    """The share of each track that still is the weights at which averaging began."""
    last_decays: Mapping[str, Number]
    """The decay of each track at the last update; 0 where it just followed."""
    has_missed_writes: bool = False
    """Whether the live weights were written to although no step was counted: the averages are outdated."""

    @property
    def is_following(self) -> bool:
        """Whether averages still equal the live weights of the last step, before `Clock.start`. Reads the values."""
        return bool(self.time > 0) and bool(self.start_time == self.time)


class Readings(NamedTuple):
    """The clock as it is, and as it is if no step was skipped: the host can read the second without waiting."""

    exact: Reading
    assumed: Reading


class ClockStep(NamedTuple):
    """One optimizer step that is not counted yet."""

    weights: Mapping[str, Number]
    """The weight of the live value by track: 0 leaves the average unchanged, 1 replaces it by the live value."""
    readings: Readings
    """The clock after this step."""

    @property
    def update_index(self) -> int | Tensor:
        """The number of this update: a tensor on the device if some were counted there."""
        updates = self.readings.exact.updates
        return updates if isinstance(updates, Tensor) else int(updates)


class Clock:
    """Counts optimizer steps, averages taken, and the time.

    Args:
        schedules: the law of each track, by name.
        start: until this time the average simply follows the live weights.
        interval: an average is taken at every step that is a multiple of it.

    Raises: TypeError or ValueError unless ``start`` is a time, 0 or more, and ``interval`` an integer, 1 or more.
    """

    def __init__(self, schedules: Mapping[str, Schedule], *, start: float, interval: int) -> None:
        self.schedules = schedules
        self.start: float = checked_number("start", start, "a time, 0 or later, in the unit of the clock")
        checked_number("update_interval", interval, "a number of optimizer steps, 1 or more", lowest=1)
        try:
            self.interval: int = operator.index(interval)  # NumPy's integers, too
        except TypeError:
            raise TypeError(f"update_interval must be an integer, got {interval!r}") from None
        self.reset()

    @property
    def steps(self) -> int:
        """Optimizer steps seen, without skipped ones. Waits for the device if some were counted there."""
        return int(self._readings.exact.steps)

    @property
    def updates(self) -> int:
        """Averages taken. Waits for the device if some were counted there."""
        return int(self._readings.exact.updates)

    @property
    def time(self) -> float:
        """What has elapsed. Waits for the device if some steps were counted there."""
        return float(self._readings.exact.time)

    def initial_mass(self, track: str) -> float:
        """The share of an average that still is the weights at which averaging began.

        Waits for the device if some steps were counted there.
        """
        return float(self._readings.exact.initial_masses[track])

    @property
    def is_known(self) -> bool:
        """Whether the host can read the clock as it is without waiting for a device."""
        steps = self._readings.exact.steps
        return not isinstance(steps, Tensor) or steps.device.type == "cpu"

    @property
    def known(self) -> Reading:
        """The clock as it is if `is_known`, else as it is if no step was skipped on the device. Never waits."""
        return self._readings.exact if self.is_known else self._readings.assumed

    def note_write(self) -> None:
        """The live weights were written to; this matters until the first step is counted."""
        if self.known.steps == 0:
            reading = Reading(*self.known[:-1], has_missed_writes=True)
            self._readings = Readings(reading, reading)

    def last_decay(self, track: str) -> float:
        """The factor of the old average at the last update, 0 where it just followed; waits as `initial_mass`."""
        return float(self._readings.exact.last_decays[track])

    def read(self) -> Reading:
        """The clock in numbers. Waits for the device if some steps were counted there."""
        steps, updates, time, start_step, start_time, last_update, masses, decays, missed = self._readings.exact
        return Reading(
            int(steps),
            int(updates),
            float(time),
            int(start_step),
            float(start_time),
            float(last_update),
            {track: float(mass) for track, mass in masses.items()},
            {track: float(decay) for track, decay in decays.items()},
            missed,
        )

    def set(self, reading: Reading) -> None:
        """Continue from ``reading``, in numbers."""
        self._readings = Readings(reading, reading)

    def reset(self) -> None:
        """Begin anew: no step was made."""
        masses, decays = dict.fromkeys(self.schedules, 1.0), dict.fromkeys(self.schedules, 0.0)
        self.set(Reading(0, 0, 0.0, 0, 0.0, 0.0, masses, decays))

    def next_step(self, elapsed: float = 1.0, found_inf: Tensor | None = None) -> ClockStep:
        """The next optimizer step; `count` counts it once its update is made.

        Args:
            elapsed: the time since the last step.
            found_inf: not zero if the optimizer skipped the step. The host never reads it, and so does not wait.

        Raises: TypeError or ValueError unless ``elapsed`` is positive and finite; ValueError for a decay outside
            [0, 1], if the host knows it.
        """
        expected = "a number of steps, samples or tokens, positive and finite"
        elapsed = float(checked_number("elapsed", elapsed, expected, open_below=True, open_above=True))
        exact, assumed = self._readings
        is_real_step = True if found_inf is None else (found_inf == 0).reshape(())
        after, weights = self._after(exact, elapsed, is_real_step)
        if found_inf is None and exact is assumed:
            return ClockStep(weights, Readings(after, after))
        return ClockStep(weights, Readings(after, self._after(assumed, elapsed, is_real_step=True)[0]))

    def count(self, step: ClockStep) -> None:
        """Count ``step``; again without effect, if it is the last one counted."""
        self._readings = step.readings

    def _after(self, now: Reading, elapsed: float, is_real_step: Truth) -> tuple[Reading, dict[str, Number]]:
        """The clock after one more step, and the weight of the live values at it, by track."""
        # The same lines serve numbers and tensors: of the latter, no value is ever looked at.
        steps = now.steps + is_real_step
        time = where(is_real_step, now.time + elapsed, now.time)
        is_following: Truth = False
        is_due: Truth = is_real_step
        if self.start > 0:
            is_following = is_real_step & (time <= self.start)
            is_due = is_due & (time > self.start)
        if self.interval > 1:
            is_due = is_due & (steps % self.interval == 0)
        decays = self._decays(now, steps, time) if is_due is not False else dict.fromkeys(self.schedules, 1.0)
        weights: dict[str, Number] = {}
        masses: dict[str, Number] = {}
        last_decays: dict[str, Number] = {}
        for track, decay in decays.items():
            weights[track] = where(is_due, 1 - decay, where(is_following, 1.0, 0.0))
            mass = now.initial_masses[track]
            masses[track] = where(is_due, mass * decay, where(is_following, 1.0, mass))
            last_decays[track] = where(is_due, decay, where(is_following, 0.0, now.last_decays[track]))
        after = Reading(
            steps,
            now.updates + is_due,
            time,
            where(is_following, steps, now.start_step),
            where(is_following, time, now.start_time),
            where(is_due if is_following is False else is_due | is_following, time, now.last_update),
            masses,
            last_decays,
        )
        return after, weights

    def _decays(self, now: Reading, steps: Number, time: Number) -> dict[str, Number]:
        arguments = {
            "time": time - now.start_time,
            "elapsed": time - now.last_update,
            "step": as_number(steps - (now.start_step + 1)),
        }
        decays = {track: schedule.decay(**arguments) for track, schedule in self.schedules.items()}
        if isinstance(time, Tensor):
            return decays
        for track, decay in decays.items():
            decays[track] = float(decay)
            if not 0 <= decay <= 1:
                raise ValueError(f"expected a decay in [0, 1] of {self.schedules[track]!r}, got {decay!r}")
        return decays
