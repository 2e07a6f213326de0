"""What a run of the benchmark has found, where it ran, and which targets it reached."""

import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmark_cases import AVERAGED_MODEL, FOREACH, OURS, Case, ExportCosts, SwapCosts, Transformer, UpdateTimes

MIB = 2**20
LAYOUTS = {"plain": "plain", "ddp": "DDP", "fsdp2": "FSDP2"}
LIMIT_TIMES_FOREACH = 1.15
LIMIT_TIMES_AVERAGED_MODEL = 0.65
LIMIT_SWAP_MIB = 64.0


@dataclass(frozen=True)
class Environment:
    """Where and when: what it takes to run the same again. `load` is the system's average over the minute before."""

    date: str
    command: str
    cpu: str
    threads: int
    load: float
    gpu: str | None
    torch: str
    python: str
    system: str

    @classmethod
    def here(cls, device_type: str) -> "Environment":
        return cls(
            date=f"{datetime.now(timezone.utc):%Y-%m-%d}",
            command=shlex.join(["python", *sys.argv]),
            cpu=_cpu(),
            threads=torch.get_num_threads(),
            load=round(os.getloadavg()[0], 1),
            gpu=torch.cuda.get_device_name() if device_type == "cuda" else None,
            torch=torch.__version__,
            python=platform.python_version(),
            system=f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        )

    def __str__(self) -> str:
        gpu = self.gpu or "no GPU, so nothing is measured on one"
        return (
            f"{self.cpu}, threads: {self.threads}, shared by the ranks, load before: {self.load}; {gpu}; "
            f"torch {self.torch}, Python {self.python}, {self.system}"
        )


@dataclass(frozen=True)
class Target:
    """A number that should not be above its limit; both count as they are shown."""

    what: str
    limit: float
    measured: float
    unit: str

    @property
    def reached(self) -> bool:
        return float(self.show(self.measured)) <= float(self.show(self.limit))

    def show(self, value: float) -> str:
        return f"{value:.0f}" if self.unit == "MiB" else f"{value:.2f}"


@dataclass
class Results:
    """Everything that one run measured."""

    environment: Environment
    updates: list[UpdateTimes] = field(default_factory=list)
    swaps: list[SwapCosts] = field(default_factory=list)
    exports: list[ExportCosts] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)

    def targets(self) -> Iterator[Target]:
        for times in self.updates:
            yield from _update_targets(times)
        for swap in self.swaps:
            what = f"{describe(swap.case)}: a swap, beyond live weights and averages"
            yield Target(what, LIMIT_SWAP_MIB, swap.extra_bytes / MIB, "MiB")
        for export in self.exports:
            one_tensor = export.largest_tensor_bytes / MIB
            what = f"{describe(export.case)}: full_state_dict()"
            yield Target(f"{what}, beyond the result on rank 0", one_tensor, export.extra_bytes / MIB, "MiB")
            if export.case.ranks > 1:
                yield Target(f"{what}, on other ranks", one_tensor, export.others_bytes / MIB, "MiB")

    def as_json(self) -> dict[str, Any]:
        updates = [asdict(times) | {"times_reference": times_reference(times)} for times in self.updates]
        targets = [asdict(target) | {"reached": target.reached} for target in self.targets()]
        return asdict(self) | {"updates": updates, "targets": targets}


def describe(case: Case) -> str:
    ranks = "1 rank" if case.ranks == 1 else f"{case.ranks} ranks"
    return f"{LAYOUTS[case.parallel]}, {ranks}, {case.shape}"


def times_reference(times: UpdateTimes) -> dict[str, float]:
    """Each competitor's time over the first one's in the same round: the median of the rounds."""
    reference = next(iter(times.seconds.values()))
    return {
        name: statistics.median(its / base for its, base in zip(seconds, reference, strict=True))
        for name, seconds in times.seconds.items()
    }


def _update_targets(times: UpdateTimes) -> Iterator[Target]:
    ratio = times_reference(times)[OURS]
    if FOREACH in times.seconds:
        yield Target(f"{describe(times.case)}: update() over {FOREACH}", LIMIT_TIMES_FOREACH, ratio, "x")
    elif isinstance(times.case.shape, Transformer):
        yield Target(f"{describe(times.case)}: update() over {AVERAGED_MODEL}", LIMIT_TIMES_AVERAGED_MODEL, ratio, "x")


def _cpu() -> str:
    """The processor's own name; Linux keeps it in a file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
