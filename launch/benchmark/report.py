"""Tables of the benchmark's results, for a terminal and for a page in Markdown."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import rich.box
import rich.table

from launch.benchmark.results import MIB, Results, Target


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
        lines = [self.columns, rule, *([_escaped(cell) for cell in row] for row in self.rows)]
        rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"### {self.title}\n\n{rows}".replace("_", r"\_")


def target_table(targets: Iterable[Target]) -> Table:
    return Table("Targets", ["", "to reach: at most", "measured", ""], 1, [*_target_rows(targets)])


def as_markdown(results: Results, tables: Iterable[Table]) -> str:
    """The part of a page below its introduction."""
    where = results.environment
    lines = [f"## Measured on {where.date}", f"`{where.command}`", f"{where}.", *results.notes()]
    return "\n\n".join([*lines, *(table.as_markdown() for table in tables)]) + "\n"


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}" if seconds < 0.1 else f"{1000 * seconds:.0f}"


def mib(size: int) -> str:
    return f"{size / MIB:.1f}"


def _escaped(cell: str) -> str:
    """Error messages are among them."""
    return cell.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")


def _target_rows(targets: Iterable[Target]) -> Iterator[Sequence[str]]:
    for target in targets:
        limit = f"{target.show(target.limit)} {target.unit}"
        if target.measured is None:
            yield target.what, limit, "", "not measured"
        else:
            verdict = "reached" if target.reached else "MISSED"
            yield target.what, limit, f"{target.show(target.measured)} {target.unit}", verdict
