"""`python -m launch.benchmark --only composer` on a tiny model, and what it says where Composer is not installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from launch.benchmark import __main__ as benchmark
from tests.support import ROOT

REPEATS = 3
OURS, THEIRS = "ema_dist.composer.EMA", "composer.algorithms.EMA"
needs_composer = pytest.mark.skipif(
    find_spec("composer") is None, reason="needs Composer, which has an environment of its own: tox -e composer"
)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=500, cwd=ROOT, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composer")
    settings = ["--device", "cpu", "--quick", "--repeats", str(REPEATS), "--only", "composer"]
    ended = run("-m", "launch.benchmark", *settings, "--output-dir", folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "composer.json").read_text())


@needs_composer
def test_both_algorithms_are_timed_in_every_round_of_the_same_trainer(results: dict[str, Any]) -> None:
    assert [(costs["case"]["parallel"], costs["case"]["ranks"]) for costs in results["costs"]] == [
        ("ddp", 2),
        ("fsdp1", 2),
    ]
    for costs in results["costs"]:
        assert [*costs["seconds"]] == [THEIRS, OURS]
        assert all(len(seconds) == REPEATS and min(seconds) > 0 for seconds in costs["seconds"].values())


@needs_composer
def test_each_rank_holds_half_of_what_composer_holds(results: dict[str, Any]) -> None:
    for costs in results["costs"]:
        assert costs["held_bytes"][THEIRS] == 4 * costs["elements"]
        assert costs["held_bytes"][OURS] < 0.6 * costs["held_bytes"][THEIRS]
        assert costs["extra_bytes"].keys() == costs["held_bytes"].keys()


@needs_composer
def test_our_update_makes_no_collective_where_composer_gathers_everything(results: dict[str, Any]) -> None:
    found = {costs["case"]["parallel"]: costs["collectives"] for costs in results["costs"]}
    assert found["ddp"] == {THEIRS: 0, OURS: 0}
    assert found["fsdp1"][THEIRS] > found["fsdp1"][OURS] == 0


@needs_composer
def test_targets_are_times_of_composers_own_and_no_collective(results: dict[str, Any]) -> None:
    assert [(target["limit"], target["unit"]) for target in results["targets"]] == [
        *((0.4, "x"), (0, "calls")),
        *((0.1, "x"), (0, "calls")),
    ]


@needs_composer
def test_the_page_says_which_composer_it_was(folder: Path, results: dict[str, Any]) -> None:
    page = (folder / "composer.md").read_text()
    assert results["composer"] in page
    assert results["environment"]["date"] in page
    assert page.count("\n### ") == 3


@pytest.fixture
def without_composer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "composer", None)
    monkeypatch.setattr(benchmark, "SECTIONS", {"composer": benchmark.SECTIONS["composer"]})


@pytest.mark.usefixtures("without_composer")
def test_without_composer_its_section_is_left_out_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cpu", "--output-dir", str(tmp_path)])
    benchmark.main()
    printed = capsys.readouterr().out
    assert re.search(r'composer.*pip install .*"\.\[composer\]"', printed)
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("without_composer")
def test_without_composer_asking_for_its_section_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--only", "composer", "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert '".[composer]"' in capsys.readouterr().err


@needs_composer
def test_on_a_gpu_asking_for_its_section_is_refused(tmp_path: Path) -> None:
    ended = run("-m", "launch.benchmark", "--only", "composer", "--device", "cuda", "--output-dir", tmp_path)
    assert ended.returncode == 2
    assert "--device cpu" in ended.stderr
