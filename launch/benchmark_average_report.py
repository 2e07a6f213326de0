"""What a run of the benchmark has found about averages: which targets it reached, and tables."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmark_cases import AVERAGED_MODEL, FOREACH, OURS, ExportCosts, SwapCosts, Transformer, UpdateTimes
from benchmark_report import Table, mib, ms, target_table
from benchmark_results import MIB, Results, Target, describe, times_reference

LIMIT_TIMES_FOREACH = 1.15
LIMIT_TIMES_AVERAGED_MODEL = 0.65
LIMIT_SWAP_MIB = 64.0


@dataclass
class AverageResults(Results):
    """What one run measured of updates, swaps and full state dicts."""

    updates: list[UpdateTimes] = field(default_factory=list)
    swaps: list[SwapCosts] = field(default_factory=list)
    exports: list[ExportCosts] = field(default_factory=list)

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
        updates = [asdict(times) | {"times_reference": times_reference(times.seconds)} for times in self.updates]
        return super().as_json() | {"updates": updates}


def average_tables(results: AverageResults) -> list[Table]:
    return [
        target_table(results.targets()),
        Table(
            "update(): slowest rank of each round",
            ["case", "elements", "averaged by", "median ms", "quartiles ms", "times the first"],
            3,
            [row for times in results.updates for row in _update_rows(times)],
        ),
        Table(
            "swapped(): memory of one rank",
            ["case", "averages MiB", "extra MiB", "median ms in", "median ms out"],
            1,
            [*_swap_rows(results.swaps)],
        ),
        Table(
            "full_state_dict()",
            ["case", "result MiB", "largest tensor MiB", "beyond the result MiB", "other ranks MiB", "median ms"],
            1,
            [*_export_rows(results.exports)],
        ),
    ]


def _update_targets(times: UpdateTimes) -> Iterator[Target]:
    ratio = times_reference(times.seconds)[OURS]
    if FOREACH in times.seconds:
        yield Target(f"{describe(times.case)}: update() over {FOREACH}", LIMIT_TIMES_FOREACH, ratio, "x")
    elif isinstance(times.case.shape, Transformer):
        yield Target(f"{describe(times.case)}: update() over {AVERAGED_MODEL}", LIMIT_TIMES_AVERAGED_MODEL, ratio, "x")


def _update_rows(times: UpdateTimes) -> Iterator[Sequence[str]]:
    case, elements = describe(times.case), f"{times.elements / 1e6:.1f}M"
    for name, ratio in times_reference(times.seconds).items():
        lower, median, upper = statistics.quantiles(times.seconds[name], method="inclusive")
        yield case, elements, name, ms(median), f"{ms(lower)} - {ms(upper)}", f"{ratio:.2f}"
        case = elements = ""


def _swap_rows(swaps: Iterable[SwapCosts]) -> Iterator[Sequence[str]]:
    for swap in swaps:
        seconds = [ms(statistics.median(seconds)) for seconds in (swap.seconds_in, swap.seconds_out)]
        yield describe(swap.case), mib(swap.shard_bytes), mib(swap.extra_bytes), *seconds


def _export_rows(exports: Iterable[ExportCosts]) -> Iterator[Sequence[str]]:
    for export in exports:
        sizes = [export.result_bytes, export.largest_tensor_bytes, export.extra_bytes]
        others = mib(export.others_bytes) if export.case.ranks > 1 else ""
        yield describe(export.case), *map(mib, sizes), others, ms(statistics.median(export.seconds))
