"""What a run of the benchmark has found in Composer's Trainer: which targets it reached, and tables."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.benchmark.composer import OURS, THEIRS, TrainerCosts
from launch.benchmark.report import Table, mib, ms, target_table
from launch.benchmark.results import Results, Target, ratios, times_reference

LIMITS = {"ddp": 0.4, "fsdp1": 0.1}


@dataclass(frozen=True)
class CountTarget(Target):
    """A count that should not be above its limit."""

    def show(self, value: float) -> str:
        return f"{value:.0f}"


@dataclass
class ComposerResults(Results):
    """What one run measured of updates in the Trainer of this version of Composer."""

    composer: str = ""
    costs: list[TrainerCosts] = field(default_factory=list)

    def targets(self) -> Iterator[Target]:
        for costs in self.costs:
            ratio = times_reference(costs.seconds)[OURS]
            yield Target(f"{costs.case}: update over {THEIRS}", LIMITS[costs.case.parallel], ratio, "x")
            yield CountTarget(f"{costs.case}: collectives in an update", 0, costs.collectives[OURS], "calls")

    def notes(self) -> list[str]:
        return [f"Composer (mosaicml) {self.composer}.", *super().notes()]

    def as_json(self) -> dict[str, Any]:
        costs = [asdict(it) | {"times_reference": times_reference(it.seconds)} for it in self.costs]
        return super().as_json() | {"costs": costs}


def composer_tables(results: ComposerResults) -> list[Table]:
    return [
        target_table(results.targets()),
        Table(
            "Update at BATCH_END: slowest rank of each round",
            ["case", "elements", "by", "median ms", "quartiles ms", "times the first", "its quartiles", "collectives"],
            3,
            [row for costs in results.costs for row in _time_rows(costs)],
        ),
        Table(
            "Memory of one rank: averages, and what an update takes beyond them",
            ["case", "by", "averages MiB", "extra MiB", "together MiB", "times the first"],
            2,
            [row for costs in results.costs for row in _memory_rows(costs)],
        ),
    ]


def _time_rows(costs: TrainerCosts) -> Iterator[Sequence[str]]:
    case, elements = str(costs.case), f"{costs.elements / 1e6:.1f}M"
    for name, of_rounds in ratios(costs.seconds).items():
        lower, median, upper = statistics.quantiles(costs.seconds[name], method="inclusive")
        least, ratio, most = statistics.quantiles(of_rounds, method="inclusive")
        times = ms(median), f"{ms(lower)} - {ms(upper)}", f"{ratio:.3f}", f"{least:.3f} - {most:.3f}"
        yield case, elements, name, *times, str(costs.collectives[name])
        case = elements = ""


def _memory_rows(costs: TrainerCosts) -> Iterator[Sequence[str]]:
    case = str(costs.case)
    together = {name: held + costs.extra_bytes[name] for name, held in costs.held_bytes.items()}
    for name, size in together.items():
        sizes = [costs.held_bytes[name], costs.extra_bytes[name], size]
        yield case, name, *map(mib, sizes), f"{size / together[THEIRS]:.2f}"
        case = ""
