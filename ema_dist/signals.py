"""Defers Python signal handlers: an exception from one could leave other ranks in a collective, or a lock held."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import inf
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

SECOND_SIGNAL_SECONDS = 5.0
"""A second signal of the same number within this time is not deferred, so that a user can still abort."""


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Defers Python signal handlers to the end of the ``with`` block; has no effect outside of the main thread.

    Otherwise Python would run them, and they could raise, between any two bytecodes of the main thread. A second signal
    of the same number within `SECOND_SIGNAL_SECONDS` runs its handler at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deferral = _Deferral()
    try:
        deferral.begin()
        yield
    finally:
        deferral.end()


class _Deferral:
    """One deferral. If an exception keeps `end` from removing its handler, that handler forwards to the original."""

    def __init__(self) -> None:
        self._is_active = False
        self._handlers: dict[int, Handler] = {}
        self._deferred: list[int] = []
        self._last_times: dict[int, float] = {}

    def begin(self) -> None:
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        self._handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
        self._is_active = True
        for number in self._handlers:
            signal.signal(number, self._defer)

    def end(self) -> None:
        self._is_active = False
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._defer:
                signal.signal(number, handler)
        with ExitStack() as stack:  # if a handler raises, the others still run
            for number in reversed(self._deferred):
                stack.callback(self._handlers[number], number, None)

    def _defer(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._is_active and now - self._last_times.get(number, -inf) > SECOND_SIGNAL_SECONDS:
            self._last_times[number] = now
            self._deferred.append(number)
        else:
            self._handlers[number](number, frame)
