"""Compares the formulas of `launch.benchmark.formulas` with measurements on 1, 2 and 4 ranks.

    python -m launch.cost --output-dir docs           # a minute or two; writes the lower half of docs/cost.md
    python -m launch.cost --quick                     # the same on a tiny model: whether it works at all

It starts the ranks it needs by itself. Linux only: it reads the memory used from the kernel. The page has projections
to large models, too.
"""

import sys

from launch.benchmark.cases import Case, LiveDtype, Parallel, Transformer
from launch.benchmark.page import Environment
from launch.benchmark.run import Run, argument_parser, make_console, parse
from launch.cost.measure import measure_costs
from launch.cost.page import cost_page

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
"""Layouts, numbers of ranks, and whether the replicas split the averages."""
DTYPES_AND_TRACKS: list[tuple[LiveDtype, int]] = [("float32", 1), ("bfloat16", 1), ("bfloat16", 2)]
"""Dtypes of live weights, and numbers of tracks.

float32 weights have one track only: for several, a kernel may be selected that reads them from a cache for each track.
"""
MEASURED_MODEL = Transformer(blocks=2, width=770)
"""770 rows are not divisible by 4, nor are the 50257 rows of the head by 2."""


def main() -> None:
    parser = argument_parser("launch.cost", __doc__, output_dir="runs/cost")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each case, at least 2")
    args = parse(parser)
    run = Run(args.device, args.repeats, make_console())
    shape = Transformer(1, 18, 97) if args.quick else MEASURED_MODEL
    environment = Environment.here(args.device)
    costs = [
        record
        for parallel, ranks, split in LAYOUTS
        for live, tracks in DTYPES_AND_TRACKS
        for record in run.measure(measure_costs, Case(parallel, ranks, shape, live), split=split, tracks=tracks)
    ]
    page = cost_page(environment, run.not_measured, costs)
    run.show_and_write(page, args.output_dir, data_name="cost.json", page_name="cost.md", program="launch.cost")
    if wrong := [target.what for target in page.targets if not target.reached]:
        sys.exit(f"formulas and measurements differ: {wrong}")


if __name__ == "__main__":
    main()
