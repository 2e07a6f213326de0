"""The page on checkpoints: the cases measured, the targets, and the tables."""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.benchmark.cases import Case, Parallel, Transformer
from launch.benchmark.checkpoints import EXPORT, LOAD, SAVE, checkpoint_costs, export_costs, gather_costs, reshard_costs
from launch.benchmark.measure import Record, file_system
from launch.benchmark.page import (
    MIB,
    Environment,
    MethodColumn,
    Page,
    Picture,
    Table,
    Target,
    comparison,
    entry,
    mib,
    target_table,
)
from launch.benchmark.picture import bars, finish
from launch.benchmark.run import Run
from launch.pictures.canvas import Canvas
from launch.pictures.charts import bar_chart

SAVE_LAYOUTS: list[tuple[Parallel, int]] = [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 4)]
RESHARD_SOURCE: tuple[Parallel, int] = ("fsdp2", 2)
RESHARD_TARGETS: list[tuple[Parallel, int]] = [("fsdp2", 1), ("fsdp2", 4), ("ddp", 2)]
LARGE_TRANSFORMER = Transformer(blocks=76)
"""A model of 2.15 GiB, which must be gathered in a few hundred MiB of memory."""
OURS = ("checkpoint.", "ema-dist ")
LIMITS = {"save": (SAVE, 1.1), "load": (LOAD, 1.1), "export": (EXPORT, 1.5)}


def measure_checkpoints(run: Run) -> Page:
    shape, large = Transformer(blocks=16), LARGE_TRANSFORMER
    if run.quick:
        shape = large = Transformer(2, 16, 97)
    environment = Environment.here(run.device_type)
    costs: list[Record] = []
    for layout in SAVE_LAYOUTS:
        with tempfile.TemporaryDirectory(dir=run.scratch) as name:
            case, folder = Case(*layout, shape), Path(name)
            costs += run.measure(checkpoint_costs, case, folder=folder)
            costs += run.measure(gather_costs, case, folder=folder)
            if layout == RESHARD_SOURCE:
                for target in RESHARD_TARGETS:
                    costs += run.measure(reshard_costs, Case(*target, shape), saved=case, folder=folder)
                costs += run.measure(export_costs, Case("plain", 1, shape), saved=case, folder=folder)
    with tempfile.TemporaryDirectory(dir=run.scratch) as name:
        costs += run.measure(gather_costs, Case(*RESHARD_SOURCE, large), folder=Path(name))
    return checkpoints_page(environment, run.not_measured, costs, files_on=file_system(run.scratch))


def checkpoints_page(environment: Environment, not_measured: list[str], costs: list[Record], *, files_on: str) -> Page:
    targets = [*_targets(costs)]
    return Page(
        environment,
        not_measured,
        {"file_system": files_on, "costs": costs},
        notes=[f"Files on {files_on}."],
        targets=targets,
        tables=[
            _table("Saving the model and its averages", costs, lambda it: it["what"] == "save"),
            _table(
                "Loading the model and its averages",
                costs,
                lambda it: it["what"] == "load" and it["case"] == it["saved"],
            ),
            _table(
                "Loading a checkpoint that another layout saved",
                costs,
                lambda it: it["what"] == "load" and it["case"] != it["saved"],
            ),
            _table("Gathering the averages into weight files", costs, lambda it: it["what"] == "gather"),
            _table(
                "Exporting the averages from a checkpoint, in one process", costs, lambda it: it["what"] == "export"
            ),
            target_table(targets),
        ],
        picture=_picture(costs, environment),
        summary=[*_summary(costs)],
    )


def _summary(costs: list[Record]) -> Iterator[str]:
    """The times to save and to load by each tool, for the layout from which other layouts load."""
    for it in costs:
        if it["what"] in LIMITS and it["what"] != "export" and not it["cold"] and _is_source(it):
            seconds = {name: statistics.median(samples) for name, samples in it["seconds"].items()}
            times = "; ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
            yield f"**To {it['what']} {it['total_bytes'] / MIB:.0f} MiB, {it['case'].layout}:** {times}."


def _is_source(it: Record) -> bool:
    """Whether a record was saved and loaded in the layout from which other layouts load."""
    return it["case"] == it["saved"] and (it["case"].parallel, it["case"].ranks) == RESHARD_SOURCE


def _picture(costs: list[Record], environment: Environment) -> Picture:
    """Seconds to save and to load by each tool, for the layout from which other layouts load."""
    canvas = Canvas(680, 0, "Seconds to save and to load a model and its averages, by each tool")
    top = 12.0
    for what in ("save", "load"):
        for it in costs:
            if it["what"] == what and _is_source(it):
                seconds = {name: statistics.median(samples) for name, samples in it["seconds"].items()}
                title = f"To {what}, {_case(it)}, {it['total_bytes'] / MIB:.0f} MiB: seconds"
                top = 14 + bar_chart(canvas, top, title, bars(seconds, "{:.2f}".format, OURS), label_width=376)
    return Picture("checkpoints.svg", finish(canvas, top, environment))


def _targets(costs: list[Record]) -> Iterator[Target]:
    for it in costs:
        if it["what"] in LIMITS:
            name, limit = LIMITS[it["what"]]
            what = f"{_case(it)}: {name} over {next(iter(it['seconds']))}"
            yield Target(what, limit, it["times_reference"][name], "x")
        for name, allowed in it["allowed_bytes"].items():
            what = f"{_case(it)}, {it['total_bytes'] / MIB:.0f} MiB: {name}, memory"
            yield Target(what, allowed / MIB, it["extra_bytes"][name] / MIB, "MiB")


def _table(title: str, costs: list[Record], belongs: Callable[[Record], bool]) -> Table:
    columns: dict[str, MethodColumn] = {
        "case": lambda it, _: _case(it),
        "MiB": lambda it, _: mib(it["total_bytes"]),
        "by": lambda _, name: name,
        **comparison("s", "{:.2f}".format, digits=2),
        "extra MiB": entry("extra_bytes", mib),
    }
    return Table.by_method(title, filter(belongs, costs), columns, once=("case", "MiB"), words=3)


def _case(it: Record) -> str:
    """The name of a case, such as `FSDP2, 2 ranks -> DDP, 2 ranks, cold`."""
    origin = f"{it['saved'].layout} -> " if it["saved"] != it["case"] else ""
    layout = "one process" if it["what"] == "export" else it["case"].layout
    return f"{origin}{layout}{', cold' if it['cold'] else ''}"
