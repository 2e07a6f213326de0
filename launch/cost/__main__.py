"""Holds the formulas of `cost.py` against measurements on 1, 2 and 4 ranks, and projects them to large models.

    python -m launch.cost --output-dir docs           # a minute or two; writes the lower half of docs/cost.md
    python -m launch.cost --quick                     # the same on a tiny model: whether it works at all

It starts the ranks it needs by itself. Linux only, as it asks the kernel for the memory it used.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from launch.benchmark.cases import Case, LiveDtype, Parallel, Transformer
from launch.benchmark.results import Environment
from launch.benchmark.run import Run, write
from launch.cost.measure import measure_costs
from launch.cost.report import CostResults, cost_tables

LAYOUTS: list[tuple[Parallel, int, bool]] = [
    ("plain", 1, True),
    ("ddp", 2, True),
    ("ddp", 4, True),
    ("ddp", 4, False),
    ("fsdp2", 1, True),
    ("fsdp2", 2, True),
    ("fsdp2", 4, True),
    ("hsdp", 4, True),
    ("hsdp", 4, False),
]
"""The last of each says whether replicas split the averages."""
DTYPES_AND_TRACKS: list[tuple[LiveDtype, int]] = [("float32", 1), ("bfloat16", 1), ("bfloat16", 2)]
"""Dtypes of live weights, and numbers of tracks; several of the live dtype may find the weights in the cache."""
MEASURED_MODEL = Transformer(blocks=2, width=770)
"""770 rows do not divide by 4, nor do the 50257 of the head by 2."""


def main() -> None:
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    shape = Transformer(1, 18, 97) if args.quick else MEASURED_MODEL
    run = Run(args.device, args.quick, Path(tempfile.gettempdir()), console, shape)
    results = CostResults(Environment.here(args.device))
    for parallel, ranks, split in LAYOUTS:
        for live, tracks in DTYPES_AND_TRACKS:
            measure_case = partial(measure_costs, split=split, tracks=tracks, repeats=args.repeats)
            results.costs += run.measure(measure_case, Case(parallel, ranks, shape, live), results.not_measured)
    tables = cost_tables(results)
    for table in tables:
        console.print(table.for_terminal())
    write(results, tables, args.output_dir, data="cost.json", page="cost.md", by="cost")
    if wrong := [target.what for target in results.targets() if not target.reached]:
        sys.exit(f"formulas and measurements differ: {wrong}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    option("--repeats", type=int, default=7, help="rounds of each case, 2 or more")
    option("--quick", action="store_true", help="on a tiny model, whose times say nothing")
    option("--output-dir", type=Path, default=Path("runs/cost"), help="where the page and its JSON go")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats: quartiles need 2 rounds or more")
    return args


if __name__ == "__main__":
    main()
