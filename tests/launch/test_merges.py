"""`python -m launch.cost.merges` with tiny tensors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from launch.cost.merges import make_checkpoints, merge
from tests.support import ROOT


def test_a_merge_is_measured_beside_cp() -> None:
    command = [sys.executable, "-m", "launch.cost.merges", "--quick", "--rounds", "1", "--checkpoints", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = dict(re.findall(r"^\| ([^|]+) \| (\S+ \| \S+) \|$", ended.stdout, re.MULTILINE))
    assert [*rows] == ["cp of all inputs", "cp of the output", "merge"]
    for name, numbers in rows.items():
        # A merge's own time is what is left without starting Python, which takes longer than adding tiny tensors.
        assert all(float(number) >= (-5 if name == "merge" else 0) for number in numbers.split(" | ")), numbers
    assert "one tensor: 0 MiB; the output: 0 MiB" in ended.stdout


def test_the_memory_of_a_merge_is_a_few_tensors_whatever_the_number_of_sources(tmp_path: Path) -> None:
    """Four sources of eight matrices of 16 MiB in bfloat16: the sum of one in float32, one as it is, and a batch."""
    make_checkpoints(tmp_path / "root", 4, 8, 2896)
    make_checkpoints(tmp_path / "tiny", 1, 1, 1)
    # The smallest of three: on a busy machine memory is returned later.
    idle, peak = (
        min(int(merge(sources, tmp_path / f"{name}-{run}").output) for run in range(3))
        for name, sources in (("idle", [tmp_path / "tiny"]), ("merged", sorted((tmp_path / "root").iterdir())))
    )
    peak -= idle
    matrix = 2896 * 2896 * 2 / 2**10
    assert 2 * matrix < peak < 3 * matrix + 2 * 16 * 2**10, "KiB"
