"""Measures what averages and their checkpoints cost, by time and memory, beside other ways to do the same.

    python -m launch.benchmark                                      # many minutes; better with nothing else running
    python -m launch.benchmark --quick                              # the same on tiny models: whether it works at all
    python -m launch.benchmark --only checkpoints --output-dir docs/benchmarks      # one page of the documentation
    python -m launch.benchmark --only averages --size 1B           # the large model; for a machine with 100 GB
    python -m launch.benchmark --only composer                     # where Composer is installed; left out elsewhere

It starts the ranks it needs by itself. Linux only, as it asks the kernel for the memory it used.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from launch.benchmark.average_report import AverageResults, found_packages
from launch.benchmark.average_tables import average_tables
from launch.benchmark.cases import Case, LiveDtype, Parallel, SmallTensors, Transformer
from launch.benchmark.checkpoint_report import CheckpointResults, checkpoint_tables
from launch.benchmark.checkpoints import checkpoint_costs, reshard_costs
from launch.benchmark.exports import export_costs, gather_costs
from launch.benchmark.measure import file_system
from launch.benchmark.overlapped_steps import step_costs
from launch.benchmark.picture import write_picture
from launch.benchmark.report import Table
from launch.benchmark.results import Environment, Results
from launch.benchmark.run import Run, write
from launch.benchmark.steps import step_shares
from launch.benchmark.swaps import full_state_costs, swap_costs
from launch.benchmark.updates import update_costs

LayoutAndRanks = tuple[Parallel, int]
UPDATE_CASES: list[tuple[Parallel, int, LiveDtype]] = [
    ("plain", 1, "float32"),
    ("plain", 1, "bfloat16"),
    ("ddp", 2, "float32"),
    ("fsdp2", 2, "float32"),
    ("fsdp2", 2, "bfloat16"),
]
SWAP_LAYOUTS: list[LayoutAndRanks] = [("plain", 1), ("ddp", 2), ("fsdp2", 2)]
TRACKS = (1, 2, 4)
SMALL_TRANSFORMER = Transformer(blocks=4, vocabulary=97)
"""Small enough that every way can keep seven averages of it."""
SIZES = {"30M": SMALL_TRANSFORMER, "100M": Transformer(), "1B": Transformer(blocks=18, width=2048)}
SAVE_LAYOUTS: list[LayoutAndRanks] = [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 4)]
RESHARD_TARGETS: list[LayoutAndRanks] = [("fsdp2", 1), ("fsdp2", 4), ("ddp", 2)]
RESHARD_SOURCE: LayoutAndRanks = ("fsdp2", 2)
LARGE_TRANSFORMER = Transformer(blocks=76)
"""2.15 GiB, to be gathered in the memory of a few hundred MiB."""


@dataclass(frozen=True)
class Section:
    """One page of results, and the rounds that it takes."""

    measure: Callable[[Run, int], tuple[Results, list[Table]]]
    repeats: int
    data: str
    page: str
    skip_reason: Callable[[str], str | None] = lambda _: None
    """What keeps it from being measured on a type of device."""
    picture: Callable[[Any, Path], object] = lambda *_: None


def measure_averages(run: Run, repeats: int) -> tuple[AverageResults, list[Table]]:
    small, large, tracked = SmallTensors(), run.large, SMALL_TRANSFORMER
    if run.quick:
        small, large, tracked = SmallTensors(20, 8), Transformer(2, 16, 97), Transformer(1, 16, 97)
    results = AverageResults(Environment.here(run.device_type), packages=found_packages())
    not_measured = results.not_measured
    for parallel, ranks, live in UPDATE_CASES:
        for shape in (small, large):
            case = Case(parallel, ranks, shape, live)
            for costs in run.measure(partial(update_costs, repeats=repeats), case, not_measured):
                results.updates += costs
    for shape in (small, tracked):
        measure_tracks = partial(update_costs, repeats=repeats, tracks=TRACKS)
        for costs in run.measure(measure_tracks, Case("plain", 1, shape), not_measured):
            results.tracks += costs
    for parallel, ranks in SWAP_LAYOUTS:
        case = Case(parallel, ranks, large)
        for swap_case in (replace(case, shape=small), case):
            results.swaps += run.measure(partial(swap_costs, repeats=repeats), swap_case, not_measured)
        results.exports += run.measure(partial(full_state_costs, repeats=repeats), case, not_measured)
        results.steps += run.measure(partial(step_shares, repeats=repeats), case, not_measured)
    if run.device_type == "cuda" and not run.quick:
        overlap_case = Case("fsdp2", torch.cuda.device_count(), SIZES["1B"])
    else:
        overlap_case = Case("fsdp2", 2, tracked)
    results.overlap += run.measure(partial(step_costs, repeats=repeats), overlap_case, not_measured)
    return results, average_tables(results)


def measure_checkpoints(run: Run, repeats: int) -> tuple[CheckpointResults, list[Table]]:
    shape = Transformer(2, 16, 97) if run.quick else Transformer(blocks=16)
    results = CheckpointResults(Environment.here(run.device_type), file_system=file_system(run.scratch))
    for layout in SAVE_LAYOUTS:
        with tempfile.TemporaryDirectory(dir=run.scratch) as folder:
            case = Case(*layout, shape)
            settings = {"repeats": repeats, "folder": Path(folder)}
            measurements = [(checkpoint_costs, case), (gather_costs, case)]
            if layout == RESHARD_SOURCE:
                reshard, export = (partial(costs, saved=case) for costs in (reshard_costs, export_costs))
                measurements += [(reshard, Case(*target_layout, shape)) for target_layout in RESHARD_TARGETS]
                measurements += [(export, Case("plain", 1, shape))]
            for costs, measured_case in measurements:
                for result in run.measure(partial(costs, **settings), measured_case, results.not_measured):
                    results.costs += result
    with tempfile.TemporaryDirectory(dir=run.scratch) as folder:
        measure_large = partial(gather_costs, repeats=repeats, folder=Path(folder))
        large = Case(*RESHARD_SOURCE, shape if run.quick else LARGE_TRANSFORMER)
        for result in run.measure(measure_large, large, results.not_measured):
            results.costs += result
    return results, checkpoint_tables(results)


def measure_composer(run: Run, repeats: int) -> tuple[Results, list[Table]]:
    # Composer is slow to import, and need not be there.
    from launch.benchmark.composer import TrainerCase, trainer_costs  # noqa: PLC0415
    from launch.benchmark.composer_report import ComposerResults, composer_tables  # noqa: PLC0415

    shape = Transformer(2, 16, 97) if run.quick else Transformer()
    results = ComposerResults(Environment.here(run.device_type), composer=version("mosaicml"))
    for parallel in ("ddp", "fsdp1"):
        case = TrainerCase(parallel, 2, shape)
        measure_trainer = partial(trainer_costs, case=case, repeats=repeats)
        results.costs.append(run.on_ranks(measure_trainer, case.ranks, str(case)))
    return results, composer_tables(results)


def composer_skip_reason(device_type: str) -> str | None:
    if find_spec("composer") is None:
        return 'it needs Composer, which is not installed: pip install "ema-dist[composer]"'
    return "it is measured on a CPU: --device cpu" if device_type != "cpu" else None


SECTIONS = {
    "averages": Section(measure_averages, repeats=20, data="results.json", page="index.md", picture=write_picture),
    "checkpoints": Section(measure_checkpoints, repeats=7, data="checkpoints.json", page="checkpoints.md"),
    "composer": Section(
        measure_composer, repeats=20, data="composer.json", page="composer.md", skip_reason=composer_skip_reason
    ),
}


def main() -> None:
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    run = Run(args.device, args.quick, args.scratch, console, SIZES[args.size])
    console.print(str(Environment.here(args.device)), highlight=False, soft_wrap=True)
    if args.quick:
        console.print("Tiny models: the times and the memory of these say nothing.")
    for name in args.only or SECTIONS:
        section = SECTIONS[name]
        if skip_reason := section.skip_reason(args.device):
            console.print(f"{name} is left out: {skip_reason}", highlight=False, markup=False)
            continue
        results, tables = section.measure(run, args.repeats or section.repeats)
        for table in tables:
            console.print(table.for_terminal())
        write(results, tables, args.output_dir, data=section.data, page=section.page)
        section.picture(results, args.output_dir)
        console.print(f"in {args.output_dir}: {section.data}, {section.page}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--only", choices=SECTIONS, nargs="+", help="one of the pages, or some; everything otherwise")
    option("--device", choices=["auto", "cpu", "cuda"], default="auto")
    option("--repeats", type=int, help="rounds of each case, 2 or more; 20 otherwise, 7 for checkpoints")
    option("--size", choices=SIZES, default="100M", help="parameters of the large model whose averages are measured")
    option("--quick", action="store_true", help="on tiny models, whose times and memory say nothing")
    option("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to save on; 8 GB")
    option("--output-dir", type=Path, default=Path("runs/benchmark"), help="where pages and their JSON go")
    args = parser.parse_args()
    if args.repeats is not None and args.repeats < 2:
        parser.error("--repeats: quartiles need 2 rounds or more")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in args.only or ():
        if skip_reason := SECTIONS[name].skip_reason(args.device):
            parser.error(f"--only {name}: {skip_reason}")
    return args


if __name__ == "__main__":
    main()
