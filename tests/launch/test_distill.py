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
    ranks = ("--standalone", "--nproc-per-node", "2")
    command = (*TORCHRUN, *ranks, LAUNCH / "distill.py", "--parallel", parallel, *short)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr

    assert "teaching from the averages themselves" in completed.stdout
    row = r"^epoch +(\d+)  student: loss ([\d.]+), .*  teacher: loss ([\d.]+), "
    scores = re.findall(row, completed.stdout, re.MULTILINE)
    assert [epoch for epoch, _, _ in scores] == ["1", "2"]
    assert all(student != teacher for _, student, teacher in scores)
    assert re.search(rf"^averaged model: test loss {scores[-1][2]}, .*, of 48 labels$", completed.stdout, re.MULTILINE)
