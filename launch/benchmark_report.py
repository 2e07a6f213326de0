"""Tables of the benchmark's results, for a terminal and for a page in Markdown."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import rich.box
import rich.table

from benchmark_cases import ExportCosts, SwapCosts, UpdateTimes
from benchmark_results import MIB, Results, Target, describe, times_reference


@dataclass(frozen=True)
class Table:
    """Rows under columns, all as text; the first `words` columns are set flush left, the numbers flush right."""

    title: str
    columns: Sequence[str]
    words: int
    rows: list[Sequence[str]]

    def for_terminal(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, title_justify="left", box=rich.box.SIMPLE_HEAD)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index < self.words else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def as_markdown(self) -> str:
        rule = [":---" if index < self.words else "---:" for index in range(len(self.columns))]
        rows = "\n".join(f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows))
        return f"### {self.title}\n\n{rows}".replace("_", r"\_")


def tables(results: Results) -> list[Table]:
    return [
        Table(
            "Targets",
            ["", "to reach: at most", "measured", ""],
            1,
            [*_target_rows(results.targets())],
        ),
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


def as_markdown(results: Results) -> str:
    """The part of a page below its introduction."""
    where = results.environment
    lines = [f"## Measured on {where.date}", f"`{where.command}`", f"{where}."]
    lines += [f"Not measured: {what}." for what in results.not_measured]
    return "\n\n".join([*lines, *(table.as_markdown() for table in tables(results))]) + "\n"


def _target_rows(targets: Iterable[Target]) -> Iterator[Sequence[str]]:
    for target in targets:
        verdict = "reached" if target.reached else "MISSED"
        yield (
            target.what,
            f"{target.show(target.limit)} {target.unit}",
            f"{target.show(target.measured)} {target.unit}",
            verdict,
        )


def _update_rows(times: UpdateTimes) -> Iterator[Sequence[str]]:
    case, elements = describe(times.case), f"{times.elements / 1e6:.1f}M"
    for name, ratio in times_reference(times).items():
        lower, median, upper = statistics.quantiles(times.seconds[name], method="inclusive")
        yield case, elements, name, _ms(median), f"{_ms(lower)} - {_ms(upper)}", f"{ratio:.2f}"
        case = elements = ""


def _swap_rows(swaps: Iterable[SwapCosts]) -> Iterator[Sequence[str]]:
    for swap in swaps:
        seconds = [_ms(statistics.median(seconds)) for seconds in (swap.seconds_in, swap.seconds_out)]
        yield describe(swap.case), _mib(swap.shard_bytes), _mib(swap.extra_bytes), *seconds


def _export_rows(exports: Iterable[ExportCosts]) -> Iterator[Sequence[str]]:
    for export in exports:
        sizes = [export.result_bytes, export.largest_tensor_bytes, export.extra_bytes]
        others = _mib(export.others_bytes) if export.case.ranks > 1 else ""
        yield describe(export.case), *map(_mib, sizes), others, _ms(statistics.median(export.seconds))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}" if seconds < 0.1 else f"{1000 * seconds:.0f}"


def _mib(size: int) -> str:
    return f"{size / MIB:.1f}"
