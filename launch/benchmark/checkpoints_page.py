"""The page on checkpoints: which cases are measured, which targets are to be reached, and the tables."""

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
    Table,
    Target,
    comparison,
    entry,
    mib,
    target_table,
)
from launch.benchmark.run import Run

SAVE_LAYOUTS: list[tuple[Parallel, int]] = [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 4)]
RESHARD_SOURCE: tuple[Parallel, int] = ("fsdp2", 2)
RESHARD_TARGETS: list[tuple[Parallel, int]] = [("fsdp2", 1), ("fsdp2", 4), ("ddp", 2)]
LARGE_TRANSFORMER = Transformer(blocks=76)
"""2.15 GiB, to be gathered in the memory of a few hundred MiB."""
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
            target_table(targets),
            _table("Saving the model and its averages", costs, lambda it: it["what"] == "save"),
            _table("Loading them", costs, lambda it: it["what"] == "load" and it["case"] == it["saved"]),
            _table(
                "Loading what another layout has saved",
                costs,
                lambda it: it["what"] == "load" and it["case"] != it["saved"],
            ),
            _table("Gathering the averages into files of weights", costs, lambda it: it["what"] == "gather"),
            _table(
                "Exporting the averages out of a checkpoint, in one process", costs, lambda it: it["what"] == "export"
            ),
        ],
    )


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
    """Such as `FSDP2, 2 ranks -> DDP, 2 ranks, cold`."""
    origin = f"{it['saved'].layout} -> " if it["saved"] != it["case"] else ""
    layout = "one process" if it["what"] == "export" else it["case"].layout
    return f"{origin}{layout}{', cold' if it['cold'] else ''}"
