"""`launch/choose.py`, run as its users run it."""

from __future__ import annotations

import csv
import os
import subprocess
from pathlib import Path

import pytest

from tests.support import LAUNCH
from tests.support.injected_signals import TORCHRUN


def test_a_width_is_chosen_after_training_on_two_ranks(tmp_path: Path) -> None:
    short = ("--device", "cpu", "--epochs", "4", "--batch-size", "648", "--snapshot-every", "2", "--dtype", "bfloat16")
    ranks = ("--standalone", "--nproc-per-node", "2")
    command = (*TORCHRUN, *ranks, LAUNCH / "choose.py", "--parallel", "fsdp2", *short, "--output-dir", tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr

    assert [path.name[-1] for path in sorted((tmp_path / "snapshots").iterdir())] == ["2", "4", "6", "8"]
    with (tmp_path / "profiles.csv").open() as file:
        profiles = {float(row["sigma_rel"]): row for row in csv.DictReader(file)}
    assert float(profiles[0.1]["total_variation"]) == pytest.approx(0, abs=1e-6), "a track itself"
    assert len({row["loss"] for row in profiles.values()}) == len(profiles) > 10
    assert (tmp_path / "profiles.png").read_bytes().startswith(b"\x89PNG")
    best = min(profiles, key=lambda width: float(profiles[width]["loss"]))
    assert f"best: sigma_rel {best};" in completed.stdout

    completed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert completed.returncode != 0
    assert f"{tmp_path} holds snapshots of another run" in completed.stderr
