"""`python -m launch.cost.bfloat16_snapshots` on two epochs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launch.cost.bfloat16_snapshots import COLUMNS
from tests.support import ROOT


def test_the_errors_of_snapshots_in_bfloat16_stay_below_their_bounds() -> None:
    command = [sys.executable, "-m", "launch.cost.bfloat16_snapshots", "--quick"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    heading, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in ended.stdout.splitlines()]
    assert heading == [*COLUMNS]
    assert len(lines) == 6
    for _, amplification, averaged, rounded, *_ in lines:
        nearest = 100 * 2**-8 / 2  # half a unit in the last place, in percent of a weight
        assert 0 < float(rounded.split()[0]) < float(amplification) * nearest * 1.01
        assert float(averaged.split()[0]) > float(rounded.split()[0])
    # The mean of the second of two epochs: (a + b) / (b - a) for a window from a to b = 2a.
    assert float(lines[-1][1]) == pytest.approx(3, abs=0.05)
