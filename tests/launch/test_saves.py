"""`python -m launch.cost.saves` on few ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT


def test_every_way_to_save_is_on_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.cost.saves", "--quick", "--repeats", "2", "--output-dir", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (record,) = json.loads((tmp_path / "saves.json").read_text())["saves"]
    assert {len(seconds) for seconds in record["seconds"].values()} == {2}
    page = (tmp_path / "saves.md").read_text()
    assert [way for way in record["seconds"] if f"| {way} |" not in page] == []
