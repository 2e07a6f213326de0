"""Kills ranks of launch/train.py at random moments, lets torchrun restart them, and compares with undisturbed runs.

    python -m tests.stress_restarts                  # 24 kills in chosen functions, then some at random times
    python -m tests.stress_restarts --seed 1 --runs 2

Each run is killed three times: while stepping, while swapping and while saving, in random order. This takes minutes, so
pytest does not run it; tests/launch/test_train.py kills three times.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.injected_signals import TORCHRUN, TRAIN_WITH_SIGNALS, InjectedSignal, differences

RANKS = 2
KILLS = 3
LAYOUTS = ("ddp", "fsdp2")

# (file, function, whether both ranks call it); each is called within a few steps of any checkpoint.
KILL_POINTS = {
    "stepping": [
        ("torch/_tensor.py", "backward", True),
        ("torch/optim/adam.py", "step", True),
        ("ema_dist/ema.py", "_update", True),
        ("launch/recipe/preemption.py", "should_stop", True),
    ],
    "swapping": [
        ("ema_dist/ema.py", "swapped", True),
        ("ema_dist/evaluation/swap.py", "__init__", True),
        ("ema_dist/communication/replica_collectives.py", "prepare_all_gather_parts", True),
        ("launch/recipe/evaluation.py", "evaluate", True),
        ("ema_dist/evaluation/swap.py", "restore_parts", True),
    ],
    "saving": [
        ("ema_dist/checkpoint/saving.py", "save", True),
        ("ema_dist/checkpoint/step_folders.py", "create_partial_folder", False),
        ("ema_dist/checkpoint/writer.py", "write_data", True),
        ("ema_dist/checkpoint/writer.py", "write", True),
        ("ema_dist/checkpoint/manifest.py", "write", False),
        ("ema_dist/checkpoint/step_folders.py", "commit", False),
        ("ema_dist/checkpoint/step_folders.py", "_remove", False),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=8, help="with kills in chosen functions, three each")
    parser.add_argument("--timed-runs", type=int, default=3, help="with kills at random times, up to three each")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kills, failures = 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layout in LAYOUTS:
            subprocess.run(command(folder / layout, layout), check=True, stdout=subprocess.DEVNULL)
        for number in range(args.runs + args.timed_runs):
            layout = LAYOUTS[number % len(LAYOUTS)]
            options = (layout, "--resume", *["--async-checkpoints"] * (number // len(LAYOUTS) % 2))
            plan = [*plan_kills(rng)] if number < args.runs else []
            killed, restarts, problems = run_with_kills(folder / "disturbed", options, plan, rng, folder / layout)
            print_lines(f"run {number} {options}: {restarts}; {problems or 'bit-identical'}", *killed)
            kills += len(killed)
            failures += bool(problems or (plan and len(killed) != KILLS))
    print_lines(f"{kills} kills, {failures} failed runs")
    sys.exit(bool(failures))


def print_lines(*lines: str) -> None:
    sys.stdout.write("\n    ".join(lines) + "\n")
    sys.stdout.flush()


def plan_kills(rng: random.Random) -> Iterator[InjectedSignal]:
    """Plans one kill of each kind, each in its own attempt."""
    for attempt, kind in enumerate(rng.sample(sorted(KILL_POINTS), KILLS)):
        file, function, any_rank = rng.choice(KILL_POINTS[kind])
        call = {"stepping": rng.randint(1, 12), "swapping": 1, "saving": rng.randint(1, 2)}[kind]
        yield InjectedSignal(file, function, call, rng.randint(0, 300), rng.randrange(RANKS) * any_rank, attempt)


def run_with_kills(
    folder: Path, options: tuple[str, ...], plan: list[InjectedSignal], rng: random.Random, uninterrupted: Path
) -> tuple[list[str], list[str], list[str]]:
    """Runs with the planned kills, or else at random times; returns the kills, the starting points and the problems."""
    shutil.rmtree(folder, ignore_errors=True)
    pids = folder / "pids"
    pids.mkdir(parents=True)
    environment = InjectedSignal.environment(plan) | {"INJECTED_SIGNALS_PIDS": str(pids)}
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command(folder, *options), stdout=output, stderr=output, env=environment)
        killed = [] if plan else [*kill_at_random(process, pids, rng)]
        process.wait(timeout=900)
    lines = log.read_text().splitlines()
    killed += [line.removeprefix("now: ") for line in lines if line.startswith("now: ")]
    starts = [line.partition(" in /")[0] for line in lines if line.startswith(("continuing", "starting"))]
    if process.returncode:
        return killed, starts, [f"exit code {process.returncode}", *lines]
    return killed, starts, differences(folder, uninterrupted)


def kill_at_random(process: subprocess.Popen[bytes], pids: Path, rng: random.Random) -> Iterator[str]:
    """Kills a rank once in each attempt, some seconds after it has started; yields descriptions."""
    for attempt in range(KILLS):
        rank, delay = rng.randrange(RANKS), rng.uniform(0, 6)
        pid = pids / f"{attempt}-{rank}"
        while process.poll() is None and not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        time.sleep(delay)
        if process.poll() is not None:
            return
        try:
            os.kill(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            return
        yield f"SIGKILL on rank {rank}, after {delay:.2f} s"


def command(folder: Path, layout: str, *options: str) -> list[str | Path]:
    ranks = ("--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", str(KILLS))
    folders = ("--output-dir", folder, "--checkpoint-dir", folder / "checkpoints", "--checkpoint-every", "5")
    training = ("--device", "cpu", "--epochs", "2", "--parallel", layout, *folders, *options)
    return [*TORCHRUN, *ranks, TRAIN_WITH_SIGNALS, *training]


if __name__ == "__main__":
    main()
