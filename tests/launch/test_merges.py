"""`python -m launch.cost.merges` with tiny tensors."""

from __future__ import annotations

import subprocess
import sys

from tests.support import ROOT


def test_a_merge_is_measured_beside_cp() -> None:
    command = [sys.executable, "-m", "launch.cost.merges", "--quick", "--rounds", "1", "--checkpoints", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [
        name for name in ("cp of all inputs", "cp of the output", "merge") if f"| {name} |" not in ended.stdout
    ] == []
    assert "peak memory" in ended.stdout
