"""How the benchmark measures: ranks of their own for each case, competitors in turn, memory as the system counts it."""

import ctypes
import gc
import os
import pickle
import random
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launch.recipe.parallelism import BACKENDS
from launch.recipe.stopwatch import stopwatch

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
LOOPBACK = "127.0.0.1"
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "launch.benchmark.preload",
]


def on_ranks(measure: Callable[[torch.device], T], ranks: int, device_type: str) -> T:
    """What `measure` returns on the first of so many ranks, each a fresh process that shares the CPU's cores fairly.

    Args:
        measure: runs on every rank, inside a process group; it travels there by pickle, and so does its answer back.
    """
    forkserver.set_forkserver_preload(PRELOADED)
    # Python 3.11 does not tell it where this script looks for modules, and what it does not find it leaves out.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    threads = max(1, torch.get_num_threads() // ranks)
    arguments = (measure, ranks, device_type, store.port, threads)
    mp.start_processes(_main, arguments, nprocs=ranks, start_method="forkserver")
    return pickle.loads(bytes.fromhex(store.get("answer").decode()))


def _main(
    rank: int, measure: Callable[[torch.device], object], ranks: int, device_type: str, port: int, threads: int
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    store = dist.TCPStore(LOOPBACK, port, is_master=False)
    dist.init_process_group(BACKENDS[device_type], store=store, rank=rank, world_size=ranks)
    answer = measure(device)
    if rank == 0:
        store.set("answer", pickle.dumps(answer).hex())
    dist.barrier()
    if device.type == "cuda":  # gloo's threads may keep torch 2.7 waiting forever, and the process ends anyway
        dist.destroy_process_group()


def in_turn(
    competitors: Mapping[K, Callable[[], object]],
    *,
    before: Callable[[K], object],
    after: Callable[[K], object] = lambda _: None,
    repeats: int,
    device: torch.device,
) -> dict[K, list[float]]:
    """Seconds of each competitor on this rank, one for each round.

    Every round runs all of them once, in an order of its own: drifting load and a cache left warm hit each alike. All
    ranks start together, each time after `before`; it gets the competitor's key, as `after` does, and neither counts.
    """
    shuffle = random.Random(0)
    watch = stopwatch(device)
    seconds: dict[K, list[float]] = {name: [] for name in competitors}
    gc.disable()
    for _ in range(repeats):
        for name in shuffle.sample(list(competitors), len(competitors)):
            before(name)
            dist.barrier()
            with watch:
                competitors[name]()
            seconds[name].append(watch.read())
            after(name)
    gc.enable()
    return seconds


def highest(values: Sequence[float], device: torch.device) -> list[float]:
    """The highest of all ranks at each place. Collective: every rank."""
    worst = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.tolist()


class HostMemory:
    """The most memory that this process had resident at once since `reset()`, beyond what it had then.

    Linux with glibc. What was freed before goes back to the system first, so that taking it again counts.
    """

    def reset(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident("VmRSS")

    def read(self) -> int:
        """Bytes."""
        return _resident("VmHWM") - self._before


class CudaMemory:
    """The most memory that this process had allocated on its GPU at once since `reset()`, beyond what it had then."""

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


def drop_from_cache(folder: Path) -> None:
    """Make the system forget the files in `folder`, which are on the disk: who reads them next reads from there."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def file_system(folder: Path) -> str:
    """The kind of the file system that `folder` is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(mount, kind) for mount, kind in mounts if folder.resolve().is_relative_to(mount)]
    return max(above, key=lambda found: len(found[0]))[1]


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
