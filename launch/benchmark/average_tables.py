"""The tables of what a run of the benchmark has found about averages."""

import statistics
from collections.abc import Iterable, Iterator, Sequence

from launch.benchmark.average_report import AverageResults, update_case
from launch.benchmark.averaging_methods import (
    AVERAGED_MODEL,
    COMPOSER,
    DIFFUSERS,
    DTENSOR_FOREACH,
    EMA_PYTORCH,
    FOREACH,
    LIGHTNING,
    OURS,
    OURS_COPY,
    TIMM,
)
from launch.benchmark.overlapped_steps import StepCosts
from launch.benchmark.report import Table, mib, ms, target_table
from launch.benchmark.results import describe, median_ratio, on_ranks, times_reference
from launch.benchmark.steps import StepShares
from launch.benchmark.swaps import ExportCosts, SwapCosts
from launch.benchmark.updates import COPY, NOT_INSTALLED, UpdateCosts

SHORT = {
    OURS: "ours",
    OURS_COPY: "ours, copy",
    FOREACH: "plain foreach",
    DTENSOR_FOREACH: "DTensor foreach",
    AVERAGED_MODEL: "torch",
    TIMM: "timm",
    EMA_PYTORCH: "ema-pytorch",
    DIFFUSERS: "diffusers",
    LIGHTNING: "Lightning",
    COMPOSER: "Composer",
}
UPDATE_COLUMNS = [
    "case",
    "averaged by",
    "median ms",
    "quartiles ms",
    "times the copy",
    "times foreach",
    "moved MiB",
    "operators",
    "averages MiB",
    "extra MiB",
]
"""Of the table with all there is about updates."""


def average_tables(results: AverageResults) -> list[Table]:
    updates = [*results.updates, *(costs for costs in results.tracks if costs.tracks > 1)]
    everything = [*results.updates, *results.tracks]
    return [
        target_table(results.targets()),
        Table(
            "Time of an update, in times that of a copy of as many bytes",
            ["case", *SHORT.values()],
            1,
            [_summary(costs) for costs in updates],
        ),
        Table(
            "Updates: slowest rank of each round", UPDATE_COLUMNS, 2, [row for it in everything for row in _rows(it)]
        ),
        Table(
            "Computing with the averages: memory of one rank",
            ["case", "by", "averages MiB", "extra MiB", "median ms in", "median ms out"],
            2,
            [row for swap in results.swaps for row in _swap_rows(swap)],
        ),
        Table(
            "full_state_dict()",
            ["case", "result MiB", "largest tensor MiB", "beyond the result MiB", "other ranks MiB", "median ms"],
            1,
            [*_export_rows(results.exports)],
        ),
        Table(
            "Share of a step of launch/train.py",
            ["case", "averaged by", "step ms", "update ms", "share"],
            2,
            [row for steps in results.steps for row in _step_rows(steps)],
        ),
        Table(
            "Steps with averages, of the slowest rank",
            ["case", "averages", "step ms", "times without"],
            2,
            [row for costs in results.overlap for row in _overlap_rows(costs)],
        ),
        Table("What fails, and how", ["by", "how", "where"], 3, [*_failures(results)]),
    ]


def _summary(costs: UpdateCosts) -> Sequence[str]:
    return update_case(costs), *(shown_ratio(costs, name) for name in SHORT)


def shown_ratio(costs: UpdateCosts, name: str) -> str:
    """To the copy; or that the way fails or is missing, or nothing where it does not apply."""
    if name in costs.seconds:
        return f"{times_reference(costs.seconds)[name]:.2f}"
    if name in costs.failures:
        return "missing" if costs.failures[name].startswith(NOT_INSTALLED) else "fails"
    return ""


def _rows(costs: UpdateCosts) -> Iterator[Sequence[str]]:
    case = f"{update_case(costs)} ({costs.elements / 1e6:.1f}M)"
    for name, ratio in times_reference(costs.seconds).items():
        lower, median, upper = statistics.quantiles(costs.seconds[name], method="inclusive")
        times = ms(median), f"{ms(lower)} - {ms(upper)}", f"{ratio:.2f}"
        if name == COPY:
            yield case, name, *times, *[""] * 5
        else:
            over_foreach = f"{median_ratio(costs.seconds[name], costs.seconds[FOREACH]):.2f}"
            operators = str(costs.operators[name])
            sizes = [mib(size[name]) for size in (costs.moved_bytes, costs.held_bytes, costs.extra_bytes)]
            yield "", name, *times, over_foreach, sizes[0], operators, *sizes[1:]


def _swap_rows(swap: SwapCosts) -> Iterator[Sequence[str]]:
    case = describe(swap.case)
    for name, held in swap.held_bytes.items():
        seconds = [ms(statistics.median(samples[name])) for samples in (swap.seconds_in, swap.seconds_out)]
        yield case, name, mib(held), mib(swap.extra_bytes[name]), *seconds
        case = ""


def _export_rows(exports: Iterable[ExportCosts]) -> Iterator[Sequence[str]]:
    for export in exports:
        sizes = [export.result_bytes, export.largest_tensor_bytes, export.extra_bytes]
        others = mib(export.others_bytes) if export.case.ranks > 1 else ""
        yield describe(export.case), *map(mib, sizes), others, ms(statistics.median(export.seconds))


def _step_rows(steps: StepShares) -> Iterator[Sequence[str]]:
    case, step = on_ranks(steps.parallel, steps.ranks), ms(statistics.median(steps.seconds_step))
    for name, share in steps.shares().items():
        yield case, name, step, ms(statistics.median(steps.seconds[name])), f"{share:.1%}"
        case = step = ""


def _overlap_rows(costs: StepCosts) -> Iterator[Sequence[str]]:
    case = f"{describe(costs.case)} ({costs.elements / 1e6:.1f}M)"
    for name, seconds in costs.seconds.items():
        yield case, name, ms(statistics.median(seconds)), f"{costs.slowdown(name):.3f}"
        case = ""


def _failures(results: AverageResults) -> Iterator[Sequence[str]]:
    found = [(update_case(costs), costs.failures) for costs in (*results.updates, *results.tracks)]
    found += [(f"{describe(swap.case)}, swapping", swap.failures) for swap in results.swaps]
    found += [(f"{on_ranks(it.parallel, it.ranks)}, launch/train.py", it.failures) for it in results.steps]
    where: dict[tuple[str, str], list[str]] = {}
    for case, failures in found:
        for name, how in failures.items():
            where.setdefault((name, how), []).append(case)
    for (name, how), cases in where.items():
        yield name, how, "everywhere" if len(cases) == len(found) else "; ".join(cases)
