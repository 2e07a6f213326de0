"""docs/tour.ipynb runs from its first cell to its last; its outputs are those of this run if ``RECORD=1`` is set."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Jupyter: the cells share one namespace, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "96")
    notebook = json.loads(TOUR.read_text())
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile("".join(cell["source"]), str(TOUR), "exec"), namespace)
                lines = [f"{line.rstrip()}\n" for line in printed.getvalue().rstrip().splitlines()]
                cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    assert namespace["average"] > namespace["live"]
    if os.environ.get("RECORD"):
        TOUR.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def test_cells_have_identifiers() -> None:
    """The format asks for unique ones since version 4.5."""
    identifiers = [cell["id"] for cell in json.loads(TOUR.read_text())["cells"]]
    assert len({*identifiers}) == len(identifiers)
