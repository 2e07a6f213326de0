"""Measures merging beside `cp` of the same files: seconds, CPU seconds and peak memory, warm.

python -m launch.cost.merges                       # 8 checkpoints of 1 GiB; prints a table for docs
python -m launch.cost.merges --quick               # a quick check with tiny tensors

Rounds are interleaved. The processor's seconds hold on a busy machine too. The peak memory is without pages of mapped
files, and without that of a merge of one tiny checkpoint.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ema_dist import checkpoint

MERGE_SCRIPT = """
import sys, threading, time
from ema_dist import checkpoint
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")))
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
checkpoint.merge(sys.argv[2:-1], sys.argv[-1])
print(peak)
"""


@dataclass(frozen=True)
class Run:
    """What one process used."""

    seconds: float
    processor_seconds: float
    output: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write, such as /dev/shm (default: a temporary folder)")
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8, help="matrices of 128 MiB in bfloat16 in each checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    width = 64 if args.quick else 8192
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_checkpoints(folder / "root", args.checkpoints, args.layers, width)
        make_checkpoints(folder / "tiny", 1, 1, 1)
        sources = sorted((folder / "root").iterdir())
        baseline = merge([folder / "tiny"], folder / "merged-tiny")
        runs: dict[str, list[Run]] = {"cp of all inputs": [], "cp of the output": [], "merge": []}
        for _ in range(args.rounds):
            runs["merge"].append(merge(sources, folder / "merged"))
            runs["cp of the output"].append(copy([folder / "merged"], folder / "copy"))
            runs["cp of all inputs"].append(copy(sources, folder / "copy"))
            shutil.rmtree(folder / "merged")
        print_table(runs, startup=baseline)
        matrix = width * width * 2
        peak = max(int(run.output) for run in runs["merge"]) - int(baseline.output)
        print(
            f"peak memory of merge: {peak / 2**10:.0f} MiB; one tensor: {matrix / 2**20:.0f} MiB; "
            f"the output: {args.layers * matrix / 2**20:.0f} MiB"
        )


def make_checkpoints(root: Path, count: int, layers: int, width: int) -> None:
    """Saves `count` checkpoints of a model of square matrices in bfloat16."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).bfloat16()
    for step in range(count):
        checkpoint.save({"model": model}, root, step=step, keep=None)


def merge(sources: list[Path], out: Path) -> Run:
    return run_process([sys.executable, "-c", MERGE_SCRIPT, "merge", *map(str, sources), str(out)])


def copy(sources: list[Path], out: Path) -> Run:
    out.mkdir()
    used = [run_process(["cp", "-r", str(source), str(out)]) for source in sources]
    shutil.rmtree(out)
    return Run(sum(run.seconds for run in used), sum(run.processor_seconds for run in used), "")


def run_process(command: list[str]) -> Run:
    """Runs a command and measures it; CPU seconds include user and system time."""
    before = os.times()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(after.elapsed - before.elapsed, processor, output)


def print_table(runs: dict[str, list[Run]], *, startup: Run) -> None:
    """Prints medians; Python's time to start and import is subtracted from the times of merges."""
    print("| | seconds | CPU seconds |\n|---|---|---|")
    for name, used in runs.items():
        seconds = statistics.median(run.seconds for run in used)
        processor = statistics.median(run.processor_seconds for run in used)
        if name == "merge":
            seconds, processor = seconds - startup.seconds, processor - startup.processor_seconds
        print(f"| {name} | {seconds:.2f} | {processor:.2f} |")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
