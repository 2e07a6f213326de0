"""The time that a block of code takes on its device, measured without making the host wait for the device."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import TracebackType


class HostStopwatch:
    """Adds up the host's time inside its `with` blocks: CPU work is finished when a call returns."""

    def __init__(self) -> None:
        self._started = 0.0
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds += time.perf_counter() - self._started

    def read(self) -> float:
        """Seconds since the last reading."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class CudaStopwatch:
    """Adds up the stream's time inside its `with` blocks, between two events; only `read()` waits for them."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def __enter__(self) -> None:
        self._record()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._record()

    def read(self) -> float:
        """Seconds since the last reading; waits for the device."""
        torch.cuda.synchronize()
        starts, ends = self._events[::2], self._events[1::2]
        self._events = []
        return sum(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)) / 1000

    def _record(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)


def stopwatch(device: torch.device) -> HostStopwatch | CudaStopwatch:
    """The stopwatch for work on `device`."""
    return CudaStopwatch() if device.type == "cuda" else HostStopwatch()
