"""The benchmark's tools: timing of interleaved calls, memory of a process, and timing of file input and output."""

import ctypes
import gc
import os
import random
import shutil
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from launch.recipe.stopwatch import HostStopwatch, stopwatch

K = TypeVar("K", bound=Hashable)
Record = dict[str, Any]
"""The measurements of one case, as they are written to JSON; most are dictionaries by the name of the method."""
MEMORY_ROUNDS = 3


class HostMemory:
    """Peak resident memory of this process since `reset()`, beyond the memory that was resident at `reset()`.

    Needs Linux with glibc. `reset()` first returns freed memory to the system, so that allocating it again counts.
    """

    def reset(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident("VmRSS")

    def read(self) -> int:
        """Bytes."""
        return _resident("VmHWM") - self._before


class CudaMemory:
    """Peak GPU memory that this process allocated since `reset()`, beyond the memory allocated at `reset()`."""

    def reset(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def read(self) -> int:
        """Bytes."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._before


def peak_memory(device: torch.device) -> HostMemory | CudaMemory:
    """The gauge for memory of `device`."""
    return CudaMemory() if device.type == "cuda" else HostMemory()


@dataclass(frozen=True)
class Samples(Generic[K]):
    """Time and memory of each call; all are maxima over ranks."""

    seconds: dict[K, list[float]]
    """Time on the device in each round."""
    host_seconds: dict[K, float]
    """The shortest time until the call returned, even if the device was still working."""
    extra_bytes: dict[K, int]
    """Peak memory beyond that before the call; 0 if it was not measured."""


@dataclass(frozen=True)
class InterleavedCalls(Generic[K]):
    """Calls to compare. Each round runs all of them once, in random order, so that a drifting load affects all alike.

    Args:
        before: called with the key of a call before it, and `after` after it; neither is timed.
    """

    calls: Mapping[K, Callable[[], object]]
    device: torch.device
    before: Callable[[K], object]
    after: Callable[[K], object] = lambda _: None

    def measure(self, rounds: int, memory: HostMemory | CudaMemory | None = None) -> Samples[K]:
        """Run the rounds; all ranks start each call together, after `before`. Collective: every rank."""
        order, watch, host_watch = random.Random(0), stopwatch(self.device), HostStopwatch()
        seconds: dict[K, list[float]] = {key: [] for key in self.calls}
        host_seconds, extra_bytes = dict.fromkeys(self.calls, float("inf")), dict.fromkeys(self.calls, 0)
        gc.disable()
        for _ in range(rounds):
            for key in order.sample(list(self.calls), len(self.calls)):
                self.before(key)
                if memory:
                    memory.reset()
                dist.barrier()
                with host_watch, watch:
                    self.calls[key]()
                host_seconds[key] = min(host_seconds[key], host_watch.read())
                seconds[key].append(watch.read())
                self.after(key)
                if memory:
                    extra_bytes[key] = max(extra_bytes[key], memory.read())
        gc.enable()
        return Samples(
            {key: highest(samples, self.device) for key, samples in seconds.items()},
            dict(zip(self.calls, highest([*host_seconds.values()], self.device), strict=True)),
            highest_by_key(extra_bytes, self.device),
        )

    def measure_memory(self) -> Samples[K]:
        """Measure memory, in separate rounds: allocating memory again that was returned to the system takes time."""
        return self.measure(MEMORY_ROUNDS, peak_memory(self.device))


def highest(values: Sequence[float], device: torch.device) -> list[float]:
    """The maximum over ranks at each index. Collective: every rank."""
    worst = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.tolist()


def highest_by_key(values: Mapping[K, int], device: torch.device) -> dict[K, int]:
    """The maximum over ranks for each key. Collective: every rank."""
    return dict(zip(values, map(int, highest([*values.values()], device)), strict=True))


def round_ratios(seconds: Sequence[float], base: Sequence[float]) -> list[float]:
    """The ratios of two calls' times in the same round."""
    return [own / other for own, other in zip(seconds, base, strict=True)]


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(round_ratios(seconds, base))


def times_reference(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median ratio of each method's time to that of the first method."""
    reference = next(iter(seconds.values()))
    return {name: median_ratio(own, reference) for name, own in seconds.items()}


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@dataclass(frozen=True)
class FileMethod:
    """A call that is timed, calls before and after it that are not, and the folder that it creates."""

    run: Callable[[], object]
    writes: Path | None = None
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None


def measure_files(
    methods: Mapping[str, FileMethod], *, repeats: int, device: torch.device, evicted: Path | None = None
) -> Record:
    """Seconds of each round and extra bytes of each method, after one round that does not count.

    All writes have reached the disk when a call begins. A method's old files are removed just before it writes new
    ones: otherwise the first method to use pages that a virtual machine has never touched would be charged for the
    host's work, too.

    Args:
        evicted: a folder whose files are removed from the system's cache before each call.
    """

    def before(name: str) -> None:
        method = methods[name]
        if is_first():
            if method.writes:
                shutil.rmtree(method.writes, ignore_errors=True)
            os.sync()
            if evicted:
                evict_from_cache(evicted)
        method.before()

    calls = {name: method.run for name, method in methods.items()}
    interleaved = InterleavedCalls(calls, device, before, after=lambda name: methods[name].after())
    interleaved.measure(1)
    samples = interleaved.measure(repeats, HostMemory())
    return {
        "seconds": samples.seconds,
        "extra_bytes": samples.extra_bytes,
        "cold": evicted is not None,
        "times_reference": times_reference(samples.seconds),
    }


def is_first() -> bool:
    """Whether this rank does what only one rank should do."""
    return dist.get_rank() == 0


def evict_from_cache(folder: Path) -> None:
    """Remove files that are on the disk from the system's cache, so that the next read comes from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def file_system(folder: Path) -> str:
    """The type of the file system that `folder` is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(mount, kind) for mount, kind in mounts if folder.resolve().is_relative_to(mount)]
    return max(above, key=lambda found: len(found[0]))[1]
