"""One run of a program that measures: on which device and how, and where it writes what it found."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from launch.benchmark.cases import Case, Transformer
from launch.benchmark.measure import on_ranks
from launch.benchmark.report import Table, as_markdown
from launch.benchmark.results import Results, describe

T = TypeVar("T")
MARKER = "<!-- Below this line launch.{} writes. -->"


@dataclass(frozen=True)
class Run:
    """How one run of the program measures."""

    device_type: str
    quick: bool
    scratch: Path
    console: Console
    large: Transformer

    def measure(self, measured: Callable[..., T], case: Case, not_measured: list[str]) -> list[T]:
        """What `measured` returns for a case, on ranks of its own; nothing where there are too few GPUs."""
        if self.device_type == "cuda" and case.ranks > torch.cuda.device_count():
            not_measured.append(f"{describe(case)} (needs {case.ranks} GPUs)")
            return []
        return [self.on_ranks(partial(measured, case=case), case.ranks, describe(case))]

    def on_ranks(self, measured: Callable[[torch.device], T], ranks: int, name: str) -> T:
        """What `measured` returns on so many ranks of their own; `name` is shown meanwhile."""
        with self.console.status(name):
            return on_ranks(measured, ranks, self.device_type)


def write(
    results: Results, tables: Iterable[Table], folder: Path, *, data: str, page: str, by: str = "benchmark"
) -> None:
    """Everything as JSON, and the tables on a page of which the part above the marker is kept; `by` whom it says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / data).write_text(json.dumps(results.as_json(), indent=1) + "\n")
    path, marker = folder / page, MARKER.format(by)
    introduction = path.read_text().partition(marker)[0] if path.exists() else ""
    path.write_text(f"{introduction}{marker}\n\n" + as_markdown(results, tables))
