"""`launch/benchmark.py` on tiny models: that it measures everything and writes it down, not how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from older_torch import holds_on_to_storage

BENCHMARK = Path(__file__).parent.parent / "launch" / "benchmark.py"
REPEATS = 3
INTRODUCTION = "# By hand\n\n<!-- Below this line launch/benchmark.py writes. -->\n\n"


def measured(folder: Path, *, only: str) -> Path:
    """The folder, in which a quick run has left one kind of results; the pages there had an introduction before."""
    for page in ("index.md", "checkpoints.md"):
        (folder / page).write_text(f"{INTRODUCTION}old results\n")
    settings = ["--device", "cpu", "--quick", "--repeats", str(REPEATS), "--only", only]
    command = [sys.executable, BENCHMARK, *settings, "--scratch", folder, "--output-dir", folder]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "times the first" in ended.stdout
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured(tmp_path_factory.mktemp("averages"), only="averages")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = measured(tmp_path_factory.mktemp("checkpoints"), only="checkpoints")
    return json.loads((folder / "checkpoints.json").read_text())


def test_every_way_to_average_is_timed_in_every_round(results: dict[str, Any]) -> None:
    found = {(times["case"]["parallel"], times["case"]["ranks"]): set(times["seconds"]) for times in results["updates"]}
    assert found == {
        ("plain", 1): {"ShardedEMA", "_foreach_lerp_ on plain lists", "AveragedModel, foreach", "Composer's formula"},
        ("fsdp2", 1): {"ShardedEMA", "_foreach_lerp_ on plain lists", "loop over DTensors"},
        ("ddp", 2): {"ShardedEMA", 'ShardedEMA, replicas="copy"', "AveragedModel, foreach"},
    }
    for times in results["updates"]:
        assert all(len(seconds) == REPEATS and min(seconds) > 0 for seconds in times["seconds"].values())
        assert next(iter(times["times_reference"].values())) == 1


def test_swaps_and_exports_are_measured_on_every_layout(results: dict[str, Any]) -> None:
    layouts = [("plain", 1), ("ddp", 2), ("fsdp2", 2)]
    for kind in ("swaps", "exports"):
        assert [(costs["case"]["parallel"], costs["case"]["ranks"]) for costs in results[kind]] == layouts
    for swap in results["swaps"]:
        assert swap["shard_bytes"] > 0
        assert len(swap["seconds_in"]) == len(swap["seconds_out"]) == REPEATS
    for export in results["exports"]:
        assert export["result_bytes"] > export["largest_tensor_bytes"] > 0


def test_what_was_reached_is_said_of_every_target(results: dict[str, Any]) -> None:
    limits = [target["limit"] for target in results["targets"] if target["unit"] == "x"]
    assert limits == [1.15, 1.15, 1.15, 1.15, 0.65]
    assert sum(target["limit"] == 64 for target in results["targets"]) == 3
    for target in results["targets"]:
        assert target["reached"] is True or target["measured"] > target["limit"]


def test_the_page_keeps_its_introduction_and_says_where_it_was_measured(folder: Path, results: dict[str, Any]) -> None:
    page = (folder / "index.md").read_text()
    assert page.startswith("# By hand\n")
    assert "old results" not in page
    assert results["environment"]["command"] in page
    assert f"## Measured on {results['environment']['date']}" in page
    assert page.count("\n### ") == 4
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert all(row.endswith(" |") for row in rows)
    assert sum("ShardedEMA" in row for row in rows) == 8


@holds_on_to_storage
def test_checkpoints_are_measured_on_every_layout_beside_other_tools(checkpoints: dict[str, Any]) -> None:
    found: dict[str, list[tuple[str, int, bool]]] = {}
    for costs in checkpoints["costs"]:
        case = costs["case"]
        kind = costs["what"] if costs["saved"] == case or costs["what"] == "export" else "reshard"
        found.setdefault(kind, []).append((case["parallel"], case["ranks"], costs["cold"]))
        assert all(len(seconds) == REPEATS and min(seconds) > 0 for seconds in costs["seconds"].values())
        assert costs["extra_bytes"].keys() == costs["seconds"].keys() > costs["allowed_bytes"].keys()
    layouts = [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 4)]
    assert found == {
        "save": [(*layout, False) for layout in layouts],
        "load": [(*layout, cold) for layout in layouts for cold in (False, True)],
        "reshard": [("fsdp2", 1, False), ("fsdp2", 4, False), ("ddp", 2, False)],
        "gather": [(*layout, False) for layout in [*layouts, ("fsdp2", 2)]],
        "export": [("plain", 1, False), ("plain", 1, True)],
    }


@holds_on_to_storage
def test_targets_of_checkpoints_are_times_of_the_plain_tool_and_memory(checkpoints: dict[str, Any]) -> None:
    times = [target["limit"] for target in checkpoints["targets"] if target["unit"] == "x"]
    memory = [target for target in checkpoints["targets"] if target["unit"] == "MiB"]
    assert sorted(times) == [1.1] * 15 + [1.5] * 2
    assert len(memory) == 2 * (4 + 2 + 1)
    assert all(target["limit"] > 0 for target in memory)


def test_a_page_that_was_not_asked_for_stays(folder: Path) -> None:
    assert (folder / "checkpoints.md").read_text() == f"{INTRODUCTION}old results\n"
    assert not (folder / "checkpoints.json").exists()
