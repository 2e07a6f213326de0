"""What a run of the benchmark has found, where it ran, and which targets it reached."""

import os
import platform
import shlex
import statistics
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from launch.benchmark.cases import Case, Parallel

MIB = 2**20
LAYOUTS = {"plain": "plain", "ddp": "DDP", "fsdp2": "FSDP2", "hsdp": "HSDP"}


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
    """A number that should not be above its limit; both count as they are shown. None has not been measured."""

    what: str
    limit: float
    measured: float | None
    unit: str

    @property
    def reached(self) -> bool:
        return self.measured is not None and float(self.show(self.measured)) <= float(self.show(self.limit))

    def show(self, value: float) -> str:
        return f"{value:.0f}" if self.unit in {"MiB", "us"} else f"{value:.2f}"


@dataclass
class Results(ABC):
    """Everything that one run measured of one kind."""

    environment: Environment
    not_measured: list[str] = field(default_factory=list)

    @abstractmethod
    def targets(self) -> Iterable[Target]:
        """What was to be reached."""

    def notes(self) -> list[str]:
        """Sentences on how this was measured, for the page."""
        return [f"Not measured: {what}." for what in self.not_measured]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"targets": [asdict(target) | {"reached": target.reached} for target in self.targets()]}


def describe(case: Case) -> str:
    return f"{layout(case)}, {case.shape}" + ("" if case.live == "float32" else f", {case.live}")


def layout(case: Case) -> str:
    return on_ranks(case.parallel, case.ranks)


def on_ranks(parallel: Parallel, ranks: int) -> str:
    return f"{LAYOUTS[parallel]}, {ranks} {'rank' if ranks == 1 else 'ranks'}"


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Each competitor's time over the first one's in the same round."""
    reference = next(iter(seconds.values()))
    return {name: [its / base for its, base in zip(own, reference, strict=True)] for name, own in seconds.items()}


def times_reference(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of these ratios."""
    return {name: statistics.median(of_rounds) for name, of_rounds in ratios(seconds).items()}


def median_ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """Of two ways that took turns: the median of the ratios within a round."""
    return statistics.median(its / other for its, other in zip(own, base, strict=True))


def _cpu() -> str:
    """The processor's own name; Linux keeps it in a file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
