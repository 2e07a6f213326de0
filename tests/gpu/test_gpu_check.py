"""The program for machines with a GPU, tried without one, so that it does not fail there for reasons of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import gpu_check
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


def test_what_a_stopped_section_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of its tests would use the GPU while later sections measure."""
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.1)
    script = "trap '' INT; sleep 1000 & echo $!; wait"
    assert gpu_check.run_group(["sh", "-c", script], tmp_path / "log", limit=2) == "stopped after 2 s"
    child = (tmp_path / "log").read_text().strip()
    status = Path(f"/proc/{child}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of the section still runs after 10 s")
    assert (
        gpu_check.run_group([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", limit=60) == "exit code 3"
    )


def test_failures_of_a_stopped_suite_are_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = """
[gw0] [ 10%] PASSED tests/gpu/test_a.py::test_one[plain, scaled]
[gw1] [ 20%] FAILED tests/gpu/test_a.py::test_two[plain, scaled]
[gw1] [ 30%] ERROR tests/gpu/test_a.py::test_three
"""
    summary = "FAILED tests/gpu/test_a.py::test_two[plain, scaled] - assert 1 == 2\n"
    monkeypatch.setattr(gpu_check, "OUT", tmp_path)
    for text, problem in ((progress, "stopped after 230 s"), (progress + summary, "exit code 1")):
        monkeypatch.setattr(
            gpu_check, "run_group", lambda _, log, text=text, problem=problem, **__: log.write_text(text) and problem
        )
        *failed, last = gpu_check.run_suite(240)
        assert [line.split()[2] for line in failed] == [
            "tests/gpu/test_a.py::test_two[plain,",
            "tests/gpu/test_a.py::test_three",
        ]
        assert last == f"FAIL suite: {problem}; 1 passed, 2 failed"
    assert "assert 1 == 2" in failed[0]
