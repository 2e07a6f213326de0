"""Averages in the memory of the CPU: they follow copies of the live weights, on a thread of their own."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ema_dist.averages.side_streams import SideStreams
from ema_dist.kernels import HostBuffer, HostCopier, Kernel, UpdateIndex, Weight

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offloaded:
    """Averages are kept in the memory of the CPU and move on a thread there, as ``ShardedEMA(..., store=Offloaded())``.

    An update copies the live weights, and returns; the averages lag behind by at most ``max_pending`` updates. Whoever
    asks for them (a swap, serving, saving, gathering) waits until they do not.

    Args:
        pin_memory: whether these copies are in memory that a device can write to while the host goes on; else an update
            waits for the device. Without a device there is nothing to pin.
        max_pending: updates that may be under way; the next one waits for the oldest.

    Memory: on the device at most 64 MiB. On the CPU beside the averages ``max_pending`` times this rank's live weights,
        in their own dtype; pinned memory may be rounded up to a power of two.
    Raises: ValueError for ``max_pending`` below 1.
    """

    pin_memory: bool = True
    max_pending: int = 1

    def __post_init__(self) -> None:
        if self.max_pending < 1:
            raise ValueError(f"max_pending is a number of updates, 1 or more, got {self.max_pending!r}")


class Worker:
    """One thread that does jobs in their order, until the process ends, all are done, or one has failed."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ema_dist")
        self._process = os.getpid()
        self._failure: BaseException | None = None

    def submit(self, job: Callable[..., None], *arguments: object) -> Future[None]:
        """Do it when all before it is done. Raises: RuntimeError in a forked process, which has no such thread."""
        self._require_same_process()
        return self._pool.submit(self._run, job, *arguments)

    def wait(self, job: Future[None] | None = None) -> None:
        """Return when it is done; None for all that were submitted. Raises: RuntimeError in a forked process."""
        self._require_same_process()
        (job or self._pool.submit(lambda: None)).result()

    def require_no_failure(self) -> None:
        """Raise RuntimeError when a job has failed: from then on, as what it was to write is written in part."""
        if self._failure:
            raise RuntimeError(
                f"an update of the averages failed on its thread: {self._failure!r}. Some may have moved: construct "
                "ShardedEMA again, and load its averages from a checkpoint"
            ) from self._failure

    def _run(self, job: Callable[..., None], *arguments: object) -> None:
        if self._failure:
            return
        try:
            job(*arguments)
        except BaseException as error:  # noqa: BLE001  whoever asks next raises it
            self._failure = error
            _log.error("an update of the averages failed: %r", error)  # nobody may ask

    def _require_same_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                "these averages move on a thread of the process that this one was forked from: use them there, or "
                "construct ShardedEMA(..., store=Offloaded()) after forking"
            )


class OffloadKernel:
    """Moves averages as the kernels that it is given, but later: call it as one of them.

    Args:
        values: live, anywhere.
        bind: makes the kernels that follow the copies, which it is given in the order of ``values``.
        worker: on which they run.
        streams: on which devices make the copies.
        store: how many copies there are.

    Memory: as `Offloaded`.
    """

    def __init__(
        self,
        values: Sequence[Tensor],
        make_kernels: Callable[[list[Tensor]], Sequence[Kernel]],
        *,
        worker: Worker,
        streams: SideStreams,
        store: Offloaded,
    ) -> None:
        self._worker = worker
        self._streams = streams
        copier = HostCopier(values)
        self._slots: deque[_Slot] = deque()
        for _ in range(store.max_pending):
            host_buffer = copier.host_buffer(pinned=store.pin_memory and bool(streams.devices))
            self._slots.append(_Slot(host_buffer, make_kernels(host_buffer.values)))

    @property
    def name(self) -> str:
        """Of the kernels that it runs."""
        return " and ".join(sorted({kernel.name for kernel in self._slots[0].kernels}))

    def __call__(self, weights: Sequence[Weight], update_index: UpdateIndex = 0) -> None:
        """Copy the live values, and let the averages follow; waits while ``max_pending`` updates are under way.

        Raises: RuntimeError when an earlier one failed; then it does nothing.
        """
        slot = self._slots[0]
        self._finish(slot)
        self._worker.require_no_failure()
        devices = self._streams.devices
        try:
            scalars = [
                scalar.to("cpu", non_blocking=scalar.device in devices) if isinstance(scalar, Tensor) else scalar
                for scalar in (*weights, update_index)
            ]
            with self._streams.fork():
                slot.host_copy.fill(non_blocking=devices)
            slot.job = self._worker.submit(
                _run_kernels, slot.kernels, self._streams.end_events, scalars[:-1], scalars[-1]
            )
            self._slots.rotate(-1)
        except BaseException:
            self._worker.wait()  # there may be a job that nobody knows of, which reads what the next one copies
            raise

    def drain(self) -> None:
        """Return when the averages have followed. Raises: RuntimeError when one of the updates failed."""
        for slot in (*self._slots,):
            self._finish(slot)
        self._worker.require_no_failure()

    def _finish(self, slot: _Slot) -> None:
        if slot.job:
            self._worker.wait(slot.job)
            slot.job = None  # only now: who interrupts the waiting must not get a slot that is in use


@dataclass
class _Slot:
    """Room for the live values of one update, what moves the averages towards them, and when that is done."""

    host_copy: HostBuffer
    kernels: Sequence[Kernel]
    job: Future[None] | None = None


def _run_kernels(
    kernels: Sequence[Kernel], copy_events: Sequence[Any], weights: Sequence[Weight], update_index: UpdateIndex
) -> None:
    for event in copy_events:
        event.synchronize()
    for kernel in kernels:
        kernel(weights, update_index)
