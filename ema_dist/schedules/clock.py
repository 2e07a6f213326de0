"""Decides which steps update the averages and with which weight, even if only the device knows which were skipped."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ema_dist.schedules.arithmetic import Number, Truth, as_float64, where
from ema_dist.schedules.checked_number import checked_number
from ema_dist.schedules.schedule import Schedule


class ClockState(NamedTuple):
    """Step counts, times and per-track shares at one step.

    If only the device knows which steps were skipped, values that depend on this are 0-d tensors on the device.
    """

    steps: Number
    """Number of optimizer steps, excluding skipped ones."""
    updates: Number
    """Number of updates, excluding steps up to `Clock.start`, which copy the live weights."""
    time: Number
    """Elapsed time, in steps, samples or tokens."""
    start_step: Number
    """The last step that copied the live weights; 0 if there was none. Averaging begins there."""
    start_time: Number
    """The time of that step."""
    last_update: Number
    """Time of the last update; before the first one, the time at which averaging began."""
    initial_masses: Mapping[str, Number]
    """The share of each track that is still the weights at which averaging began."""
    last_decays: Mapping[str, Number]
    """Decay of each track at the last update; 0 if that step copied the live weights."""
    has_missed_writes: bool = False
    """Whether the live weights were written to although no step was counted: the averages are outdated."""

    @property
    def is_following(self) -> bool:
        """Whether the last step was not after `Clock.start`, and so copied the weights. Waits for the device."""
        return bool(self.time > 0) and bool(self.start_time == self.time)


class ClockStates(NamedTuple):
    """The actual state of the clock, and its state if no step was skipped, which the host can read without waiting."""

    actual: ClockState
    if_none_skipped: ClockState


class ClockStep(NamedTuple):
    """The weights of one optimizer step, and the clock after it. `Clock.count` makes it current."""

    weights: Mapping[str, Number]
    """The weight of the live value by track: 0 leaves the average unchanged, 1 replaces it by the live value."""
    states: ClockStates
    """The clock after this step."""

    @property
    def update_index(self) -> int | Tensor:
        """The number of this update: a tensor on the device if some were counted there."""
        updates = self.states.actual.updates
        return updates if isinstance(updates, Tensor) else int(updates)


class Clock:
    """Counts optimizer steps, updates and the elapsed time.

    Args:
        schedules: the law of each track, by name.
        start: time up to which the averages copy the live weights.
        interval: update at every optimizer step whose number is a multiple of ``interval``.

    Raises: TypeError or ValueError unless ``start`` is a number >= 0 and ``interval`` an integer >= 1.
    """

    def __init__(self, schedules: Mapping[str, Schedule], *, start: float, interval: int) -> None:
        self.schedules = schedules
        self.start: float = checked_number("start", start, "a number >= 0 (steps, or the unit of update(elapsed=))")
        checked_number("update_interval", interval, "an integer >= 1", lowest=1)
        try:
            self.interval: int = operator.index(interval)  # NumPy's integers, too
        except TypeError:
            raise TypeError(f"update_interval must be an integer >= 1, got {interval!r}") from None
        self.reset()

    @property
    def steps(self) -> int:
        """Number of optimizer steps, excluding skipped ones. Waits for the device if some were counted there."""
        return int(self._states.actual.steps)

    @property
    def updates(self) -> int:
        """Number of updates. Waits for the device if some were counted there."""
        return int(self._states.actual.updates)

    @property
    def time(self) -> float:
        """Elapsed time. Waits for the device if some steps were counted there."""
        return float(self._states.actual.time)

    def initial_mass(self, track: str) -> float:
        """The share of an average that is still the weights at which averaging began.

        Waits for the device if some steps were counted there.
        """
        return float(self._states.actual.initial_masses[track])

    @property
    def is_known(self) -> bool:
        """Whether the host can read the actual state of the clock without waiting for a device."""
        steps = self._states.actual.steps
        return not isinstance(steps, Tensor) or steps.device.type == "cpu"

    @property
    def known(self) -> ClockState:
        """The actual state if `is_known`, else the state if no step was skipped on the device. Never waits."""
        return self._states.actual if self.is_known else self._states.if_none_skipped

    def note_write(self) -> None:
        """Record that the live weights were written to. No effect once a step was counted."""
        if self.known.steps == 0:
            state = ClockState(*self.known[:-1], has_missed_writes=True)
            self._states = ClockStates(state, state)

    def last_decay(self, track: str) -> float:
        """The decay at the last update; 0 if it copied the live weights. Waits like `initial_mass`."""
        return float(self._states.actual.last_decays[track])

    def read_on_host(self) -> ClockState:
        """The current state as Python numbers. Waits for the device if some steps were counted there."""
        steps, updates, time, start_step, start_time, last_update, masses, decays, missed = self._states.actual
        return ClockState(
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

    def restore(self, state: ClockState) -> None:
        """Replace the current state by ``state``, which holds Python numbers."""
        self._states = ClockStates(state, state)

    def reset(self) -> None:
        """Return to step 0 and time 0, with an initial mass of 1."""
        masses, decays = dict.fromkeys(self.schedules, 1.0), dict.fromkeys(self.schedules, 0.0)
        self.restore(ClockState(0, 0, 0.0, 0, 0.0, 0.0, masses, decays))

    def next_step(self, elapsed: float = 1.0, found_inf: Tensor | None = None) -> ClockStep:
        """The next optimizer step; pass it to `count` once its update is done.

        Args:
            elapsed: the time since the last step.
            found_inf: nonzero if the optimizer skipped the step. The host never reads it, so it does not wait.

        Raises: TypeError or ValueError unless ``elapsed`` is positive and finite; ValueError for a decay outside
            [0, 1], if the host knows it.
        """
        expected = "a positive, finite number of steps, samples or tokens"
        hint = "; pass .item()" if isinstance(elapsed, Tensor) else ""
        elapsed = float(checked_number("elapsed", elapsed, expected, open_below=True, open_above=True, hint=hint))
        actual, if_none_skipped = self._states
        is_real_step = True if found_inf is None else (found_inf == 0).reshape(())
        after, weights = self._advance(actual, elapsed, is_real_step)
        if found_inf is None and actual is if_none_skipped:
            return ClockStep(weights, ClockStates(after, after))
        return ClockStep(weights, ClockStates(after, self._advance(if_none_skipped, elapsed, is_real_step=True)[0]))

    def next_weights(self) -> Mapping[str, Number]:
        """The weight of the live values by track at the next step that changes the averages, if each takes time 1.

        Assumes that no step was skipped if only the device knows.
        """
        state, weights = self._advance(self.known, 1.0, is_real_step=True)
        for _ in range(1, self.interval):
            if any(weights.values()):
                break
            state, weights = self._advance(state, 1.0, is_real_step=True)
        return weights

    def count(self, step: ClockStep) -> None:
        """Make the state after ``step`` current. Calling it again with the same step has no effect."""
        self._states = step.states

    def _advance(self, now: ClockState, elapsed: float, is_real_step: Truth) -> tuple[ClockState, dict[str, Number]]:
        """The clock after one more step, and the weight of the live values at that step, by track."""
        # The same code handles numbers and tensors. It must not branch on the value of a tensor: that would wait for
        # the device.
        steps = now.steps + is_real_step
        time = where(is_real_step, now.time + elapsed, now.time)
        is_following, is_due = self._is_following_or_due(steps, time, is_real_step)
        decays = self._decays(now, steps, time) if is_due is not False else dict.fromkeys(self.schedules, 1.0)
        weights: dict[str, Number] = {}
        masses: dict[str, Number] = {}
        last_decays: dict[str, Number] = {}
        for track, decay in decays.items():
            weights[track] = where(is_due, 1 - decay, where(is_following, 1.0, 0.0))
            mass = now.initial_masses[track]
            masses[track] = where(is_due, mass * decay, where(is_following, 1.0, mass))
            last_decays[track] = where(is_due, decay, where(is_following, 0.0, now.last_decays[track]))
        after = ClockState(
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

    def _is_following_or_due(self, steps: Number, time: Number, is_real_step: Truth) -> tuple[Truth, Truth]:
        """Whether the step copies the live weights, and whether it updates the averages."""
        is_following: Truth = False
        is_due: Truth = is_real_step
        if self.start > 0:
            is_following = is_real_step & (time <= self.start)
            is_due = is_due & (time > self.start)
        if self.interval > 1:
            is_due = is_due & (steps % self.interval == 0)
        return is_following, is_due

    def _decays(self, now: ClockState, steps: Number, time: Number) -> dict[str, Number]:
        arguments = {
            "time": time - now.start_time,
            "elapsed": time - now.last_update,
            "step": as_float64(steps - (now.start_step + 1)),
        }
        decays = {track: schedule.decay(**arguments) for track, schedule in self.schedules.items()}
        if isinstance(time, Tensor):
            return decays
        for track, decay in decays.items():
            decays[track] = float(decay)
            if not 0 <= decay <= 1:
                raise ValueError(f"{self.schedules[track]!r}.decay() must return a number in [0, 1], got {decay!r}")
        return decays
