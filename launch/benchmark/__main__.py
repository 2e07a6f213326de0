"""Measures what averages and their checkpoints cost, in time and memory, beside other ways to do the same.

    python -m launch.benchmark                                      # many minutes; better with nothing else running
    python -m launch.benchmark --quick                              # the same on tiny models: whether it works at all
    python -m launch.benchmark --only checkpoints --output-dir docs/benchmarks      # one page of the documentation
    python -m launch.benchmark --only averages --size 1B           # the large model; for a machine with 100 GB
    python -m launch.benchmark --only composer                     # where Composer is installed; left out elsewhere
    python -m launch.benchmark --rewrite --output-dir docs/benchmarks     # the pages again, from their recorded JSON

It starts the ranks it needs by itself. Linux only: it reads the memory used from the kernel.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from launch.benchmark.averages_page import SIZES, averages_page, measure_averages
from launch.benchmark.checkpoints_page import checkpoints_page, measure_checkpoints
from launch.benchmark.composer_page import composer_page
from launch.benchmark.page import Environment, Page
from launch.benchmark.recorded import Recorded
from launch.benchmark.run import Run, argument_parser, make_console, parse


@dataclass(frozen=True)
class Section:
    """One page of results, and how to measure it.

    Args:
        rewrite: makes the page again from its recorded JSON.
        skip_reason: returns why the page cannot be measured on a device type, or None.
    """

    measure: Callable[[Run], Page]
    rewrite: Callable[[Recorded], Page]
    repeats: int
    data_name: str
    page_name: str
    skip_reason: Callable[[str], str | None] = lambda _: None


def measure_composer(run: Run) -> Page:
    from launch.benchmark import composer  # noqa: PLC0415 - Composer is slow to import, and may be missing

    return composer.measure_composer(run)


def rewrite_composer(recorded: Recorded) -> Page:
    return composer_page(
        recorded.environment, recorded.not_measured, recorded["costs"], composer_version=recorded["composer"]
    )


def rewrite_averages(recorded: Recorded) -> Page:
    results = {key: recorded[key] for key in ("updates", "tracks", "swaps", "exports", "steps", "overlap")}
    return averages_page(recorded.environment, recorded.not_measured, results, packages=recorded["packages"])


def rewrite_checkpoints(recorded: Recorded) -> Page:
    return checkpoints_page(
        recorded.environment, recorded.not_measured, recorded["costs"], files_on=recorded["file_system"]
    )


def composer_skip_reason(device_type: str) -> str | None:
    if find_spec("composer") is None:
        return 'it needs Composer, which is not installed: pip install -c constraints-composer.txt ".[composer]"'
    return "it is measured on a CPU: --device cpu" if device_type != "cpu" else None


SECTIONS = {
    "averages": Section(measure_averages, rewrite_averages, 20, "results.json", "index.md"),
    "checkpoints": Section(measure_checkpoints, rewrite_checkpoints, 7, "checkpoints.json", "checkpoints.md"),
    "composer": Section(measure_composer, rewrite_composer, 20, "composer.json", "composer.md", composer_skip_reason),
}


def main() -> None:
    args = parse_arguments()
    console = make_console()
    if args.rewrite:
        for name in args.only or SECTIONS:
            section = SECTIONS[name]
            page = section.rewrite(Recorded.read(args.output_dir / section.data_name))
            page.write(args.output_dir, data=section.data_name, page=section.page_name, program="launch.benchmark")
        return
    console.print(str(Environment.here(args.device)), highlight=False, soft_wrap=True)
    if args.quick:
        console.print("Tiny models: the times and the memory of these say nothing.")
    for name in args.only or SECTIONS:
        section = SECTIONS[name]
        if skip_reason := section.skip_reason(args.device):
            console.print(f"{name} is left out: {skip_reason}", highlight=False, markup=False)
            continue
        run = Run(args.device, args.repeats or section.repeats, console, args.quick, args.scratch, SIZES[args.size])
        run.show_and_write(
            section.measure(run),
            args.output_dir,
            data_name=section.data_name,
            page_name=section.page_name,
            program="launch.benchmark",
        )


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser("launch.benchmark", __doc__, output_dir="runs/benchmark")
    option = parser.add_argument
    option("--only", choices=SECTIONS, nargs="+", help="pages to measure (default: all)")
    option("--repeats", type=int, help="rounds of each case, at least 2 (default: 20, for checkpoints 7)")
    option("--rewrite", action="store_true", help="write the pages again from their JSON, without measuring")
    option("--size", choices=SIZES, default="100M", help="number of parameters of the large model")
    scratch = Path(tempfile.gettempdir())
    option("--scratch", type=Path, default=scratch, help="where checkpoints are saved; needs 8 GB")
    args = parse(parser)
    for name in (args.only or ()) if not args.rewrite else ():
        if skip_reason := SECTIONS[name].skip_reason(args.device):
            parser.error(f"--only {name}: {skip_reason}")
    return args


if __name__ == "__main__":
    main()
