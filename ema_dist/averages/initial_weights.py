"""Warns before an average is used as the model's weights while more than 10 % of it is still the initial weights."""

from __future__ import annotations

import warnings

from ema_dist.averages.live_model import LiveModel
from ema_dist.averages.live_writes import ATTACHING, BEGINNING, LiveWrites
from ema_dist.averages.optimizer_hook import OptimizerHook
from ema_dist.messages import warn_caller
from ema_dist.schedules.clock import Clock, ClockState

LARGEST_SHARE = 0.1
"""The largest share of the initial weights in an average for which there is no warning."""


class InitialWeightsWarning(UserWarning):
    """An average was used as the model's weights, but more than 10 % of it is still the initial weights.

    The initial weights are those at which averaging began. This includes averages that were never updated.
    """


class OptimizerHookWarning(UserWarning):
    """The live weights were written to, but the attached optimizer has never called its ``step()``."""


class InitialWeights:
    """Decides whether to warn, once for each kind of call and each track, without waiting for the device.

    An average without updates equals the live weights until they are written to, so there is no warning before that.
    """

    def __init__(self, clock: Clock, live: LiveModel) -> None:
        self._clock = clock
        self._is_first = live.is_first
        self.writes: LiveWrites = LiveWrites(live)
        self._hook: OptimizerHook | None = None
        self._warned: set[tuple[str, ...]] = set()
        self.begin(are_loaded=False)

    def begin(self, *, are_loaded: bool) -> None:
        """Record that the averages now match the live weights.

        Args:
            are_loaded: True if they were loaded, and the live weights may be loaded later; False if they are copies.
        """
        self.writes.averages_were_loaded = are_loaded
        self.writes.mark(BEGINNING)
        self.writes.mark(ATTACHING)
        self._warned.clear()

    def watch(self, hook: OptimizerHook) -> None:
        """Record that an optimizer was attached."""
        self._hook = hook
        self.writes.mark(ATTACHING)
        self._warned.discard((ATTACHING,))

    def prepare_to_save(self) -> None:
        """Record writes to the live weights in the clock, so that averages without updates count as outdated later."""
        if self.writes.was_written_since(BEGINNING):
            self._clock.note_write()

    def check_hook(self) -> Warning | None:
        """Warn if the attached optimizer never took a step, although the live weights were written to.

        Returns: the warning if the user has turned warnings into errors, else None.
        """
        hook = self._hook
        if hook is None or not hook.is_active or hook.has_run or not self.writes.was_written_since(ATTACHING):
            return None
        if_loaded = "" if self._clock.known.steps else "; if weights were loaded into the model instead, call reset()"
        message = (
            f"attach(): {hook.optimizer_name}.step() was never called although the live weights were written to, so "
            "the averages were not updated. This happens if the loop calls other methods instead, such as first_step() "
            "and second_step(), or steps another optimizer. Attach the optimizer whose step() is called last, or "
            f"remove() the handle and call update() after each step{if_loaded}"
        )
        return self._warn((ATTACHING,), message, OptimizerHookWarning)

    def check(self, call: str, track: str, *, track_label: str) -> Warning | None:
        """Warn before ``call`` uses an average as the model's weights, if too much of it is the initial weights.

        Args:
            call: the name of the method that uses the average.
            track_label: names the track if there are several; else empty.

        Returns: as `check_hook`.
        """
        clock = self._clock
        known = clock.known
        mass, updates = float(known.initial_masses[track]), int(known.updates)
        if mass <= LARGEST_SHARE or known.is_following:
            return None
        if updates:
            condition = "" if clock.is_known else ", if a gradient scaler skipped no step"
            message = (
                f"{describe_share(mass)} of the average{track_label} is still the initial weights after "
                f"{_count(updates, 'update')} by {clock.schedules[track]!r}{condition}. Train for longer, or use a law "
                "that forgets them sooner, such as HalfLife(1000, ramp=0.05)"
            )
        elif known.steps:
            message = (
                f"the average{track_label} is still the initial weights: none of {_count(int(known.steps), 'step')} "
                f"has updated it, with start={clock.start} and update_interval={clock.interval}"
            )
        elif known.has_missed_writes or self.writes.was_written_since(BEGINNING):
            message = (
                f"the average{track_label} was never updated, but the live weights were written to: it is still the "
                "initial weights. Call update() after each optimizer step, or attach(optimizer) once; after loading "
                "weights into the model, call reset()"
            )
        else:
            return None
        return self._warn((call, track), f"{call}(): {message}", InitialWeightsWarning)

    def _warn(self, kind: tuple[str, ...], message: str, category: type[Warning]) -> Warning | None:
        if kind in self._warned:
            return None
        self._warned.add(kind)
        try:
            if self._is_first:
                warn_caller(message, category)
            else:
                # Shows nothing, but raises if warnings are errors: a call without communication must raise on all ranks
                # or on none.
                with warnings.catch_warnings(record=True):
                    warn_caller(message, category)
        except Warning as warning:  # an error, which the caller must report to the other ranks first
            return warning
        return None


def describe_stored(clock: ClockState, track: str, law: str) -> str:
    """Says how much of the stored averages is still the initial weights; empty if at most 10 % is."""
    mass, updates = float(clock.initial_masses[track]), int(clock.updates)
    if mass <= LARGEST_SHARE:
        return ""
    if clock.is_following:
        return f"the averages of track {track!r} are copies of the live weights: averaging has not begun (start)"
    if updates:
        share, count = describe_share(mass), _count(updates, "update")
        return f"{share} of the averages of track {track!r} is still the initial weights after {count} by {law}"
    steps = f" in {_count(int(clock.steps), 'step')}" if clock.steps else ""
    return f"the averages of track {track!r} were never updated{steps}: they are still the initial weights"


def describe_share(mass: float) -> str:
    """A share in percent; a share below 1 is never rounded up to 100 %."""
    return f"{mass:.1%}" if mass == 1 else f"{min(mass, 0.999):.1%}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
