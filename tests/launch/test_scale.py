"""`python -m launch.cost.scale` on tiny models and few fake ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT


def test_the_time_of_every_call_is_on_the_page(tmp_path: Path) -> None:
    settings = ["--quick", "--repeats", "2", "--layouts", "hsdp", "--output-dir", tmp_path]
    command = [sys.executable, "-m", "launch.cost.scale", *settings]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads((tmp_path / "scale.json").read_text())
    assert [it["case"]["ranks"] for it in (*results["scale"], *results["large"])] == [16, 64, 64]
    page = (tmp_path / "scale.md").read_text()
    assert [call for call in results["scale"][0]["seconds"] if f"| {call} |".replace("_", r"\_") not in page] == []
