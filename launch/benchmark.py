"""Measures what averages cost: update() against other ways to average, swaps and exports by time and memory.

    python launch/benchmark.py                                      # minutes; better with nothing else running
    python launch/benchmark.py --quick                              # the same on tiny models: whether it works at all
    python launch/benchmark.py --output-dir docs/benchmarks         # the page of the documentation

It starts the ranks it needs by itself. Linux only, as it asks the kernel for the memory it used.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from benchmark_cases import Case, Parallel, SmallTensors, Transformer, export_costs, swap_costs, update_times
from benchmark_measure import on_ranks
from benchmark_report import as_markdown, tables
from benchmark_results import Environment, Results, describe

T = TypeVar("T")
UPDATED: list[tuple[Parallel, int]] = [("plain", 1), ("fsdp2", 1), ("ddp", 2)]
SWAPPED: list[tuple[Parallel, int]] = [("plain", 1), ("ddp", 2), ("fsdp2", 2)]
MARKER = "<!-- Below this line launch/benchmark.py writes. -->\n\n"


def main() -> None:
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    results = measure(args, console)
    for table in tables(results):
        console.print(table.for_terminal())
    write(results, args.output_dir)
    console.print(f"in {args.output_dir}: results.json, index.md")


def measure(args: argparse.Namespace, console: Console) -> Results:
    """Case by case, each on ranks of its own."""
    device_type = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    small, large = (SmallTensors(20, 8), Transformer(2, 16, 97)) if args.quick else (SmallTensors(), Transformer())
    results = Results(Environment.here(device_type))
    console.print(str(results.environment), highlight=False, soft_wrap=True)
    if args.quick:
        console.print("Tiny models: the times and the memory of these say nothing.")

    def run(measured: Callable[..., T], case: Case, collected: list[T]) -> None:
        if device_type == "cuda" and case.ranks > torch.cuda.device_count():
            results.not_measured.append(f"{describe(case)} (needs {case.ranks} GPUs)")
            return
        with console.status(describe(case)):
            collected.append(on_ranks(partial(measured, case=case, repeats=args.repeats), case.ranks, device_type))

    for parallel, ranks in UPDATED:
        for shape in (small, large):
            run(update_times, Case(parallel, ranks, shape), results.updates)
    for parallel, ranks in SWAPPED:
        run(swap_costs, Case(parallel, ranks, large), results.swaps)
        run(export_costs, Case(parallel, ranks, large), results.exports)
    return results


def write(results: Results, folder: Path) -> None:
    """Everything as JSON, and the tables on a page of which the part above the marker is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results.as_json(), indent=1) + "\n")
    page = folder / "index.md"
    introduction = page.read_text().partition(MARKER)[0] if page.exists() else ""
    page.write_text(introduction + MARKER + as_markdown(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--device", choices=["auto", "cpu", "cuda"], default="auto")
    option("--repeats", type=int, default=20, help="rounds of each case, 2 or more")
    option("--quick", action="store_true", help="on tiny models, whose times and memory say nothing")
    option("--output-dir", type=Path, default=Path("runs/benchmark"), help="where results.json and index.md go")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats: quartiles need 2 rounds or more")
    return args


if __name__ == "__main__":
    main()
