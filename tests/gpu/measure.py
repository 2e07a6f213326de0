"""What gpu_check.py reports with, and how it measures times and memory."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

DEVICE = os.environ.get("DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
IS_SMALL = bool(os.environ.get("SMALL"))
MIB, GIB = 2**20, 2**30


def report(kind: str, name: str, value: object = "") -> None:
    print(f"{kind} {name}: {value}", flush=True)


def check(name: str, ok: bool, value: object = "") -> None:  # noqa: FBT001 - the result is what this is about
    report("PASS" if ok else "FAIL", name, value)


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """An exception is a FAIL, and the next check runs."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        report("FAIL", name, f"{type(error).__name__}: {str(error)[:300]}".replace("\n", " "))
        traceback.print_exc(limit=-4, file=sys.stdout)


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], repeats: int = 10, *, of_host: bool = False) -> float:
    """The median time of the device, by events; or of the host, until the call returns."""
    call()
    synchronize()
    measured: list[float] = []
    for _ in range(repeats):
        if of_host or not ON_GPU:
            begin = time.perf_counter()
            call()
            measured.append(time.perf_counter() - begin)
            synchronize()
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            measured.append(start.elapsed_time(end) / 1000)
    return sorted(measured)[len(measured) // 2]


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak bytes of the device during the call, beyond those before."""
    if not ON_GPU:
        call()
        return 0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth() -> float:
    """Bytes a second that a copy on the device reads and writes: what every other time is compared with."""
    source = torch.empty(4096 if IS_SMALL else GIB, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))
