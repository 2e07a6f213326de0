"""Averages in CPU memory: a thread updates them from copies of the live weights."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from ema_dist.averages.side_streams import SideStreams
from ema_dist.kernels import HostBuffer, HostCopier, Kernel, UpdateIndex, Weight, WriteLog
from ema_dist.messages import log_visibly
from ema_dist.signals import deferred_signals

_log = logging.getLogger(__name__)

S = TypeVar("S")


@dataclass(frozen=True)
class Offloaded:
    """Stores averages in CPU memory and updates them on a thread: ``ShardedEMA(..., store=Offloaded())``.

    An update copies the live weights and returns; the averages lag behind by at most ``max_pending`` updates. Every
    call that reads the averages (a swap, serving, saving, gathering) waits for the pending updates.

    Args:
        pin_memory: copy the live weights into pinned memory, so that the host need not wait for the device. Nothing is
            pinned if all weights are on the CPU.
        max_pending: maximum number of updates in progress; the next one waits for the oldest.

    Memory: on the device at most 64 MiB. On the CPU, beside the averages, ``max_pending`` copies of this rank's live
        weights in their own dtype; pinned memory may be rounded up to a power of two.
    Raises: ValueError for ``max_pending`` below 1.
    """

    pin_memory: bool = True
    max_pending: int = 1

    def __post_init__(self) -> None:
        if self.max_pending < 1:
            raise ValueError(f"max_pending must be a number of updates, 1 or more, got {self.max_pending!r}")


class Worker:
    """One thread that runs jobs in the order of submission; after a failure it skips all later jobs."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ema_dist")
        self._process_id = os.getpid()
        self._failure: BaseException | None = None

    def submit(self, job: Callable[..., None], *arguments: object) -> Future[None]:
        """Run ``job`` after all earlier ones. Raises: RuntimeError in a forked process, which has no such thread."""
        self._require_same_process()
        with deferred_signals():  # an interrupted thread pool may stay locked
            return self._pool.submit(self._run_job, job, *arguments)

    def wait(self, job: Future[None] | None = None) -> None:
        """Wait for ``job``, or for all submitted jobs if None. Raises: RuntimeError in a forked process."""
        self._require_same_process()
        with deferred_signals():
            (job or self._pool.submit(lambda: None)).result()

    def require_no_failure(self) -> None:
        """Raise RuntimeError if any job has failed so far: the averages may be partly written."""
        if self._failure:
            raise RuntimeError(
                f"an update of the averages failed on its thread: {self._failure!r}. Some averages may be updated and "
                "others not: construct ShardedEMA again, and load its averages from a checkpoint"
            ) from self._failure

    def _run_job(self, job: Callable[..., None], *arguments: object) -> None:
        if self._failure:
            return
        try:
            job(*arguments)
        except BaseException as error:  # noqa: BLE001  require_no_failure() raises it
            self._failure = error
            # The process may end before a later call raises the error.
            log_visibly(_log, logging.ERROR, f"an update of the averages failed: {error!r}")

    def _require_same_process(self) -> None:
        if os.getpid() != self._process_id:
            raise RuntimeError(
                "these averages are updated by a thread of the parent process, which this forked process does not "
                "have: use them in the parent process, or construct ShardedEMA(..., store=Offloaded()) after forking"
            )


class OffloadKernel:
    """A kernel that copies the live values to the CPU and lets a thread run the real kernels on the copies.

    Args:
        values: live tensors on any devices.
        make_kernels: makes the kernels that read the CPU copies; it gets the copies in the order of ``values``.
        worker: the thread that runs the kernels.
        streams: the streams on which the devices copy the live values.
        store: the number of copies, and whether they are pinned.

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
        self._last_job: _Job | None = None

    @property
    def name(self) -> str:
        """The names of the kernels that the thread runs."""
        return " and ".join(sorted({kernel.name for kernel in self._slots[0].kernels}))

    def __call__(
        self, weights: Sequence[Weight], update_index: UpdateIndex = 0, write_log: WriteLog | None = None
    ) -> None:
        """Copy the live values and submit the update; waits while ``max_pending`` updates are in progress.

        Raises: RuntimeError when an earlier update failed; then nothing is copied.
        """
        write_log = write_log or WriteLog()
        slot = self._slots[0]
        if self._last_job is None or self._last_job.write_log is not write_log:
            self._wait_for(slot)
            self._worker.require_no_failure()
            host_weights = [self._to_host(weight) for weight in weights]
            host_index = self._to_host(update_index)
            with self._streams.fork():
                slot.host_buffer.fill(non_blocking=self._streams.devices)
            wait_for_copies = partial(self._streams.synchronize, self._streams.end_events)
            run_kernels = partial(_run_kernels, slot.kernels, wait_for_copies, host_weights, host_index)
            self._last_job = _Job(write_log, run_kernels)
        write_log.begin()
        # If this call is repeated after an interrupt, it submits the same job again, and the job runs only once.
        slot.future = self._worker.submit(self._last_job.run)
        self._slots.rotate(-1)

    def _to_host(self, scalar: S | Tensor) -> S | Tensor:
        if not isinstance(scalar, Tensor):
            return scalar
        return scalar.to("cpu", non_blocking=scalar.device in self._streams.devices)

    def drain(self) -> None:
        """Wait for all pending updates. Raises: RuntimeError when one of them failed."""
        for slot in (*self._slots,):  # a copy: a signal handler or another thread may rotate them during a wait
            self._wait_for(slot)
        self._worker.require_no_failure()

    def _wait_for(self, slot: _Slot) -> None:
        if slot.future:
            self._worker.wait(slot.future)
            slot.future = None  # not earlier: after an interrupted wait the slot is still in use


@dataclass
class _Slot:
    """The CPU copies of one update's live values, the kernels that read them, and the job that runs the kernels."""

    host_buffer: HostBuffer
    kernels: Sequence[Kernel]
    future: Future[None] | None = None


class _Job:
    """Runs the kernels of the update that has this ``write_log``, once, however often it is submitted."""

    def __init__(self, write_log: WriteLog, run_kernels: Callable[[], None]) -> None:
        self.write_log = write_log
        self._remaining = iter([run_kernels])

    def run(self) -> None:
        for run_kernels in self._remaining:
            run_kernels()


def _run_kernels(
    kernels: Sequence[Kernel],
    wait_for_copies: Callable[[], None],
    weights: Sequence[Weight],
    update_index: UpdateIndex,
) -> None:
    wait_for_copies()
    for kernel in kernels:
        kernel(weights, update_index)
