"""The program for machines with a GPU, tried without one, so that it does not fail there for reasons of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT


def test_it_reports_each_finding_and_writes_the_table(tmp_path: Path) -> None:
    """Each section is a process that loads torch: only two of them run here."""
    environment = {**os.environ, "SMALL": "1", "DEVICE": "cpu", "OUT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "gpu" / "gpu_check.py", "environment", "memory"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    findings = json.loads((tmp_path / "results.json").read_text())
    assert "PASS 8B stochastic: update takes at most 64 MiB: 0" in findings
    assert not [line for line in findings if line.startswith("FAIL")]
    assert " PASS, 0 FAIL" in run.stdout
    assert (tmp_path / "gpu.md").read_text().count("\n| ") == len(findings)
