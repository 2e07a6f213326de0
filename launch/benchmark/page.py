"""A page of results: where they were measured, which targets were reached, and tables of what was measured."""

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import rich.box
import rich.table
import torch

from launch.benchmark.measure import Record, round_ratios
from launch.pictures.canvas import Canvas

MIB = 2**20
RecordColumn = Callable[[Record], str]
"""The text of a cell."""
MethodColumn = Callable[[Record, str], str]
"""The text of a cell for a method, by the method's name."""


@dataclass(frozen=True)
class Environment:
    """What is needed to repeat a measurement. `load` is the system's load average over the preceding minute."""

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
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        return cls(
            date=f"{datetime.now(timezone.utc):%Y-%m-%d}",
            command=shlex.join(["python", *sys.orig_argv[1:]]),
            cpu=names[0] if names else platform.machine(),
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
    """A number that should not exceed its limit. Both are rounded as on the page. None: not measured."""

    what: str
    limit: float
    measured: float | None
    unit: str

    @property
    def reached(self) -> bool:
        return self.measured is not None and float(self.show(self.measured)) <= float(self.show(self.limit))

    def show(self, value: float) -> str:
        return f"{value:.0f}" if self.unit in {"MiB", "us", "calls"} else f"{value:.2f}"


@dataclass(frozen=True)
class Table:
    """Rows under columns, all as text. The first `words` columns are left-aligned, the others right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    @classmethod
    def by_record(cls, title: str, records: Iterable[Record], columns: Mapping[str, RecordColumn]) -> "Table":
        """One row for each record."""
        return cls(title, [*columns], [[cell(record) for cell in columns.values()] for record in records])

    @classmethod
    def by_method(
        cls,
        title: str,
        records: Iterable[Record],
        columns: Mapping[str, MethodColumn],
        *,
        key: str = "seconds",
        once: Sequence[str] = ("case",),
        words: int = 2,
    ) -> "Table":
        """One row for each method in `record[key]`. Columns in `once` are filled only in the first row of a record."""
        rows = [
            ["" if index and header in once else cell(record, name) for header, cell in columns.items()]
            for record in records
            for index, name in enumerate(record[key])
        ]
        return cls(title, [*columns], rows, words)

    def for_terminal(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, title_justify="left", box=rich.box.SIMPLE_HEAD)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index < self.words else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def as_markdown(self) -> str:
        rule = [":---" if index < self.words else "---:" for index in range(len(self.columns))]
        lines = [self.columns, rule, *([_escaped(cell) for cell in row] for row in self.rows)]
        rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"### {self.title}\n\n{rows}".replace("_", r"\_")


class Picture(NamedTuple):
    """A drawing and its file."""

    name: str
    canvas: Canvas


@dataclass(frozen=True)
class Page:
    """All results of one section of a run.

    Args:
        not_measured: cases that were left out.
        data: further entries of the JSON.
        notes: sentences on how this was measured.
        summary: the main results, as sentences in Markdown; they come first on the page.
    """

    environment: Environment
    not_measured: list[str]
    data: Mapping[str, Any]
    notes: list[str]
    targets: list[Target]
    tables: list[Table]
    picture: Picture | None = None
    summary: Sequence[str] = ()

    def as_json(self) -> str:
        targets = [asdict(target) | {"reached": target.reached} for target in self.targets]
        about = {"environment": self.environment, "not_measured": self.not_measured}
        return json.dumps(about | {**self.data, "targets": targets}, indent=1, default=asdict) + "\n"

    def as_markdown(self) -> str:
        where = self.environment
        lines = [f"## Measured on {where.date}"]
        lines += ["\n".join(f"- {sentence}" for sentence in self.summary)] if self.summary else []
        lines += [f"![{self.picture.canvas.description}]({self.picture.name})"] if self.picture else []
        lines += [f"`{where.command}`", f"{where}.", *self.notes]
        lines += [f"Not measured: {what}." for what in self.not_measured]
        return "\n\n".join([*lines, *(table.as_markdown() for table in self.tables)]) + "\n"

    def write(self, folder: Path, *, data: str, page: str, program: str) -> None:
        """Writes the JSON, the picture, and the part of the page between its two markers.

        The text above the first marker and below the second one is written by hand, and is kept. A page may lack the
        second marker.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / data).write_text(self.as_json())
        path = folder / page
        begin, end = f"<!-- Below this line {program} writes. -->", f"<!-- Above this line {program} writes. -->"
        introduction, _, rest = (path.read_text() if path.exists() else "").partition(begin)
        _, has_end, conclusion = rest.partition(end)
        kept = f"\n{end}{conclusion}" if has_end else ""
        path.write_text(f"{introduction}{begin}\n\n{self.as_markdown()}{kept}")
        if self.picture:
            (folder / self.picture.name).write_text(self.picture.canvas.as_svg())


def target_table(targets: Iterable[Target]) -> Table:
    rows = []
    for target in targets:
        measured, verdict = "", "not measured"
        if target.measured is not None:
            measured = f"{target.show(target.measured)} {target.unit}"
            verdict = "reached" if target.reached else "MISSED"
        rows.append([target.what, f"{target.show(target.limit)} {target.unit}", measured, verdict])
    return Table("Targets of this project, for maintainers", ["target", "limit", "measured", "result"], rows)


def entry(key: str, show: Callable[[Any], str]) -> MethodColumn:
    """The entry of `record[key]` for a method, or an empty text."""
    return lambda record, name: show(record[key][name]) if name in record[key] else ""


def comparison(unit: str, show: Callable[[float], str], digits: int) -> dict[str, MethodColumn]:
    """Columns of each method's times, and of their ratios to those of the first method."""

    def ratios(record: Record, name: str) -> list[float]:
        return round_ratios(record["seconds"][name], next(iter(record["seconds"].values())))

    def ratio(value: float) -> str:
        return f"{value:.{digits}f}"

    return {
        f"median {unit}": entry("seconds", lambda samples: show(statistics.median(samples))),
        f"quartiles {unit}": entry("seconds", lambda samples: quartiles(samples, show)),
        "times the first": lambda record, name: ratio(statistics.median(ratios(record, name))),
        "its quartiles": lambda record, name: quartiles(ratios(record, name), ratio),
    }


def quartiles(values: Sequence[float], show: Callable[[float], str]) -> str:
    lower, _, upper = statistics.quantiles(values, method="inclusive")
    return f"{show(lower)} - {show(upper)}"


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}" if seconds < 0.1 else f"{1000 * seconds:.0f}"


def mib(size: float) -> str:
    return f"{size / MIB:.1f}"


def _escaped(cell: str) -> str:
    """Cells may hold error messages, which may contain Markdown."""
    return cell.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")
