"""Several ways to do the same with files: their times and memory, with the disk and the caches alike for each."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from launch.benchmark.cases import Case
from launch.benchmark.measure import HostMemory, drop_from_cache, highest, in_turn

What = Literal["save", "load", "gather", "export"]


@dataclass(frozen=True)
class Costs:
    """Seconds of each way, one a round, and its most memory beyond what was resident before, in bytes.

    The first way is what the others are held against.

    Args:
        saved: the case that saved what is loaded or exported.
        total_bytes: of all full tensors.
        cold: whether the checkpoint came from the disk, not from the system's cache.
        allowed_bytes: the memory that a way may take, where it has a limit.
    """

    what: What
    case: Case
    saved: Case
    total_bytes: int
    seconds: dict[str, list[float]]
    extra_bytes: dict[str, int]
    cold: bool = False
    allowed_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """One way to do it: what counts, what comes before and after, and the folder that it writes, which is not there."""

    run: Callable[[], object]
    writes: Path | None = None
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None


def measured(
    ways: Mapping[str, Way], *, repeats: int, device: torch.device, forgotten: Path | None = None
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds by round and bytes of each way, after one turn of each that does not count.

    Nothing is left for the disk to do when a turn begins. A way's old files go just before it writes new ones: whoever
    is the first to get pages that a virtual machine has never touched would pay for the host's work, too.

    Args:
        forgotten: a folder that the system's cache loses before each turn.
    """
    memory = HostMemory()
    extra_bytes: dict[str, list[int]] = {name: [] for name in ways}

    def before(name: str) -> None:
        way = ways[name]
        if is_first():
            if way.writes:
                shutil.rmtree(way.writes, ignore_errors=True)
            os.sync()
            if forgotten:
                drop_from_cache(forgotten)
        way.before()
        memory.reset()

    def after(name: str) -> None:
        ways[name].after()
        extra_bytes[name].append(memory.read())

    runs = {name: way.run for name, way in ways.items()}
    in_turn(runs, before=before, after=after, repeats=1, device=device)
    seconds = in_turn(runs, before=before, after=after, repeats=repeats, device=device)
    largest = highest([max(taken[1:]) for taken in extra_bytes.values()], device)
    slowest = {name: highest(samples, device) for name, samples in seconds.items()}
    return slowest, dict(zip(ways, map(int, largest), strict=True))


def is_first() -> bool:
    """Whether this is the rank that does what only one should."""
    return dist.get_rank() == 0
