"""Warns before an average is used as the model's weights that still is, for more than a tenth, the initial weights."""

from __future__ import annotations

from ema_dist.averages.live_model import LiveModel
from ema_dist.averages.live_writes import LiveWrites
from ema_dist.averages.optimizer_hook import OptimizerHook
from ema_dist.messages import warn_caller
from ema_dist.schedules.clock import Clock

LARGEST_SHARE = 0.1
"""The share of an average that may still be the initial weights without a warning."""

_BEGINNING = "beginning"
_ATTACHING = "attach()"


class InitialWeightsWarning(UserWarning):
    """An average was used as the model's weights, but more than a tenth of it still is the weights it began with.

    Or it was never updated although the live weights were written to, or the hook of an attached optimizer never ran.
    """


class InitialWeights:
    """Decides whether to warn, once for each kind of call and each track, and never waits for the device.

    Silent where the live weights were never written to, as in a check before training: the average then equals them.
    """

    def __init__(self, clock: Clock, live: LiveModel) -> None:
        self._clock = clock
        self._is_first = live.is_first
        self.writes = LiveWrites(live)
        self._hook: OptimizerHook | None = None
        self._warned: set[tuple[str, ...]] = set()
        self.begin()

    def begin(self) -> None:
        """Averages were made, loaded or reset: they belong to the live weights, which may have been loaded, too."""
        self.writes.mark(_BEGINNING)
        self.writes.mark(_ATTACHING)

    def watch(self, hook: OptimizerHook) -> None:
        """An optimizer was attached."""
        self._hook = hook
        self.writes.mark(_ATTACHING)

    def check_hook(self) -> Warning | None:
        """Warn if the hook of the attached optimizer never ran, although the live weights were written to.

        Returns: the warning, where the user has made warnings errors.
        """
        hook = self._hook
        if hook is None or not hook.is_active or hook.has_run or not self.writes.was_written_since(_ATTACHING):
            return None
        return self._warn(
            ("attach()",),
            f"attach() has seen no step of the {hook.optimizer_name}, but the live weights were written to: its step() "
            "is never called, as in loops that call first_step() and second_step(), or another optimizer steps. Attach "
            "the one whose step() runs last, or remove() the handle and call update(); if weights were loaded instead, "
            "call reset()",
        )

    def check(self, call: str, track: str, *, track_label: str) -> Warning | None:
        """Warn before ``call`` uses the average of ``track`` as the model's weights, if too much of it is initial.

        Args:
            call: the kind of call.
            track_label: names the track where there are several, else empty.

        Returns: as `check_hook`.
        """
        mass = self._clock.assumed_initial_mass(track)
        if mass <= LARGEST_SHARE or self._clock.assumes_following or not self.writes.was_written_since(_BEGINNING):
            return None
        updates = self._clock.assumed_updates
        if not updates:
            message = (
                f"{call}: the average{track_label} was never updated, but the live weights were written to since it "
                "began: it still is the initial weights. Call update() after each optimizer step, or "
                "attach(optimizer) once; after weights were loaded into the model, call reset()"
            )
        else:
            law = self._clock.schedules[track]
            message = (
                f"{call}: {mass:.1%} of the average{track_label} still is the weights at which averaging began, after "
                f"{updates} update{'s' * (updates != 1)} by {law!r}. Train for longer, or take a law that forgets them "
                "soon, such as HalfLife(1000, ramp=0.05)"
            )
        return self._warn((call, track), message)

    def _warn(self, kind: tuple[str, ...], message: str) -> Warning | None:
        if kind in self._warned:
            return None
        self._warned.add(kind)
        if self._is_first:
            try:
                warn_caller(message, InitialWeightsWarning)
            except Warning as warning:  # an error, which the caller must report to the other ranks first
                return warning
        return None
