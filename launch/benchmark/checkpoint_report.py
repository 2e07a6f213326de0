"""What a run of the benchmark has found about checkpoints: which targets it reached, and tables."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.benchmark.checkpoints import LOAD, SAVE
from launch.benchmark.exports import EXPORT
from launch.benchmark.file_methods import Costs, What
from launch.benchmark.report import Table, mib, target_table
from launch.benchmark.results import MIB, Results, Target, layout, ratios, times_reference

LIMITS: dict[What, tuple[str, float]] = {"save": (SAVE, 1.1), "load": (LOAD, 1.1), "export": (EXPORT, 1.5)}
COLUMNS = ["case", "MiB", "by", "median s", "quartiles s", "times the first", "its quartiles", "extra MiB"]


@dataclass
class CheckpointResults(Results):
    """What one run measured of checkpoints, on a disk with this file system."""

    file_system: str = ""
    costs: list[Costs] = field(default_factory=list)

    def targets(self) -> Iterator[Target]:
        for costs in self.costs:
            if costs.what in LIMITS:
                name, limit = LIMITS[costs.what]
                what = f"{_case(costs)}: {name} over {next(iter(costs.seconds))}"
                yield Target(what, limit, times_reference(costs.seconds)[name], "x")
            for name, allowed in costs.allowed_bytes.items():
                what = f"{_case(costs)}, {costs.total_bytes / MIB:.0f} MiB: {name}, memory"
                yield Target(what, allowed / MIB, costs.extra_bytes[name] / MIB, "MiB")

    def notes(self) -> list[str]:
        return [f"Files on {self.file_system}.", *super().notes()]

    def as_json(self) -> dict[str, Any]:
        costs = [asdict(it) | {"times_reference": times_reference(it.seconds)} for it in self.costs]
        return super().as_json() | {"costs": costs}


def checkpoint_tables(results: CheckpointResults) -> list[Table]:
    def table(title: str, belongs: Callable[[Costs], bool]) -> Table:
        return Table(title, COLUMNS, 3, [row for it in results.costs if belongs(it) for row in _rows(it)])

    return [
        target_table(results.targets()),
        table("Saving the model and its averages", lambda it: it.what == "save"),
        table("Loading them", lambda it: it.what == "load" and it.case == it.saved),
        table("Loading what another layout has saved", lambda it: it.what == "load" and it.case != it.saved),
        table("Gathering the averages into files of weights", lambda it: it.what == "gather"),
        table("Exporting the averages out of a checkpoint, in one process", lambda it: it.what == "export"),
    ]


def _rows(costs: Costs) -> Iterator[Sequence[str]]:
    case, size = _case(costs), mib(costs.total_bytes)
    for name, of_rounds in ratios(costs.seconds).items():
        lower, median, upper = statistics.quantiles(costs.seconds[name], method="inclusive")
        least, ratio, most = statistics.quantiles(of_rounds, method="inclusive")
        quartiles = f"{lower:.2f} - {upper:.2f}", f"{ratio:.2f}", f"{least:.2f} - {most:.2f}"
        yield case, size, name, f"{median:.2f}", *quartiles, mib(costs.extra_bytes[name])
        case = size = ""


def _case(costs: Costs) -> str:
    """Such as `FSDP2, 2 ranks -> DDP, 2 ranks, cold`."""
    origin = f"{layout(costs.saved)} -> " if costs.saved != costs.case else ""
    return origin + ("one process" if costs.what == "export" else layout(costs.case)) + (", cold" if costs.cold else "")
