"""The page on Composer: the targets and the tables. This module does not need Composer."""

import statistics
from collections.abc import Iterator

from launch.benchmark.cases import Parallel
from launch.benchmark.measure import Record
from launch.benchmark.page import Environment, Page, Picture, Table, Target, comparison, entry, mib, ms, target_table
from launch.benchmark.picture import bars, finish, whole_mib
from launch.pictures.canvas import Canvas
from launch.pictures.charts import bar_chart

OURS, THEIRS = "ema_dist.composer.EMA", "composer.algorithms.EMA"
LIMITS: dict[Parallel, float] = {"ddp": 0.4, "fsdp1": 0.1}
"""Limits of the time of our update, relative to that of Composer's own."""


def composer_page(
    environment: Environment, not_measured: list[str], costs: list[Record], *, composer_version: str
) -> Page:
    targets = [*_targets(costs)]
    return Page(
        environment,
        not_measured,
        {"composer": composer_version, "costs": costs},
        notes=[f"Composer (mosaicml) {composer_version}."],
        targets=targets,
        tables=[
            Table.by_method(
                "Update at BATCH_END: slowest rank of each round",
                costs,
                {
                    "case": lambda it, _: it["case"].layout,
                    "elements": lambda it, _: f"{it['elements'] / 1e6:.1f}M",
                    "by": lambda _, name: name,
                    **comparison("ms", ms, digits=3),
                    "collectives": entry("collectives", str),
                },
                once=("case", "elements"),
                words=3,
            ),
            Table.by_method(
                "Memory of one rank: averages, and the additional memory of an update",
                costs,
                {
                    "case": lambda it, _: it["case"].layout,
                    "by": lambda _, name: name,
                    "averages MiB": entry("held_bytes", mib),
                    "extra MiB": entry("extra_bytes", mib),
                    "together MiB": lambda it, name: mib(_together(it, name)),
                    "times the first": lambda it, name: f"{_together(it, name) / _together(it, THEIRS):.2f}",
                },
            ),
            target_table(targets),
        ],
        picture=_picture(costs, environment),
        summary=[*map(_summary, costs)],
    )


def _summary(it: Record) -> str:
    """The time and memory of an update, compared with Composer's own."""
    times = {name: ms(statistics.median(samples)) for name, samples in it["seconds"].items()}
    memory = {name: mib(_together(it, name)) for name in times}
    return (
        f"**{it['case'].layout}, {it['elements'] / 1e6:.1f}M parameters:** an update takes {times[OURS]} ms, and "
        f"averages and update together {memory[OURS]} MiB of a rank (Composer's own: {times[THEIRS]} ms, "
        f"{memory[THEIRS]} MiB)."
    )


def _picture(costs: list[Record], environment: Environment) -> Picture:
    canvas = Canvas(680, 0, "Time and memory of an update by either EMA in Composer")
    top = 12.0
    for it in costs:
        seconds = {name: statistics.median(samples) for name, samples in it["seconds"].items()}
        memory = {name: _together(it, name) for name in seconds}
        title = f"{it['case'].layout}, {it['elements'] / 1e6:.1f}M parameters"
        top = 14 + bar_chart(canvas, top, f"{title}: ms of an update", bars(seconds, ms, (OURS,)), label_width=240)
        title = f"{title}: MiB kept, and added by an update"
        top = 14 + bar_chart(canvas, top, title, bars(memory, whole_mib, (OURS,)), label_width=240)
    return Picture("composer.svg", finish(canvas, top, environment))


def _targets(costs: list[Record]) -> Iterator[Target]:
    for it in costs:
        layout, limit = it["case"].layout, LIMITS[it["case"].parallel]
        yield Target(f"{layout}: update over {THEIRS}", limit, it["times_reference"][OURS], "x")
        yield Target(f"{layout}: collectives in an update", 0, it["collectives"][OURS], "calls")


def _together(it: Record, name: str) -> int:
    return it["held_bytes"][name] + it["extra_bytes"][name]
