"""`launch/distill.py`, run as its users run it."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.support import LAUNCH
from tests.support.injected_signals import TORCHRUN


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_student_is_taught_by_its_own_average_on_two_ranks(parallel: str) -> None:
    short = ("--device", "cpu", "--epochs", "2", "--batch-size", "648", "--half-life", "2")
    command = (
        *TORCHRUN,
        "--standalone",
        "--nproc-per-node",
        "2",
        LAUNCH / "distill.py",
        "--parallel",
        parallel,
        *short,
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr

    assert "teaching from the averages themselves" in ended.stdout
    row = r"^epoch +(\d+)  student: loss ([\d.]+), .*  teacher: loss ([\d.]+), "
    scores = re.findall(row, ended.stdout, re.MULTILINE)
    assert [epoch for epoch, _, _ in scores] == ["1", "2"]
    assert all(student != teacher for _, student, teacher in scores)
    assert re.search(rf"^averaged model: test loss {scores[-1][2]}, .*, of 48 labels$", ended.stdout, re.MULTILINE)
