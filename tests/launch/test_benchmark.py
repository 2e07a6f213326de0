"""`python -m launch.benchmark` on tiny models: that it measures everything and writes it down, not how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.benchmark import __main__ as benchmark
from launch.benchmark.averaging_methods import (
    AVERAGED_MODEL,
    COMPOSER,
    DIFFUSERS,
    EMA_PYTORCH,
    FOREACH,
    LIGHTNING,
    OURS,
    OURS_AUTO,
    TIMM,
    averaging_methods,
)
from launch.benchmark.cases import Case, LiveDtype, SmallTensors
from launch.benchmark.formulas import update_bytes
from launch.benchmark.operators import count_operators
from launch.benchmark.page import Environment, Page
from launch.benchmark.updates import DECAYS, update_numbers
from tests.support import ROOT
from tests.support.torch_2_7 import IS_BEFORE_TORCH_2_8, needs_stable_storage

PEERS = {
    "torch AveragedModel, foreach",
    "Composer's formula",
    "timm ModelEmaV3",
    "ema-pytorch EMA",
    "diffusers EMAModel, foreach",
    "Lightning EMAWeightAveraging",
}
PACKAGES = {
    "timm": "timm",
    "ema_pytorch": "ema-pytorch",
    "diffusers": "diffusers",
    "pytorch_lightning": "pytorch-lightning",
}
REPEATS = 3
PAGES = ["averages"] if IS_BEFORE_TORCH_2_8 else ["averages", "checkpoints"]
# By method: how often an update passes over the live weights and over the averages; if the live dtype is narrower.
PASSES = {
    FOREACH: ((1, 2), (1, 4)),
    OURS: ((1, 2), (1, 2)),
    OURS_AUTO: ((1, 2), (1, 2)),
    AVERAGED_MODEL: ((1, 2), (1, 2)),
    # A narrow live weight is added to the average after that was multiplied.
    TIMM: ((1, 2), (1, 4)),
    EMA_PYTORCH: ((1, 2), (1, 4)),
    # (average - live), then the average minus a part of that.
    DIFFUSERS: ((1, 5), (1, 5)),
    # Two products, their sum, a copy.
    LIGHTNING: ((3, 6), (3, 6)),
    COMPOSER: ((3, 6), (3, 6)),
}
INTRODUCTION = "# By hand\n\n<!-- Below this line launch.benchmark writes. -->\n\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a quick run of all pages but Composer's; there were pages with an introduction before."""
    folder = tmp_path_factory.mktemp("benchmark")
    for page in ("index.md", "checkpoints.md", "composer.md"):
        (folder / page).write_text(f"{INTRODUCTION}old results\n")
    settings = ["--device", "cpu", "--quick", "--repeats", str(REPEATS), "--only", *PAGES]
    command = [sys.executable, "-m", "launch.benchmark", *settings, "--scratch", folder, "--output-dir", folder]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("Targets") == len(PAGES)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def checkpoints(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoints.json").read_text())


def test_every_method_is_timed_in_every_round_or_reports_its_error(results: dict[str, Any]) -> None:
    found = {(it["case"]["parallel"], it["case"]["ranks"], it["case"]["live"]) for it in results["updates"]}
    float32 = {("plain", 1, "float32"), ("ddp", 2, "float32"), ("fsdp2", 2, "float32")}
    assert found == float32 | {("plain", 1, "bfloat16"), ("fsdp2", 2, "bfloat16")}
    for costs in results["updates"]:
        works, fails = set(costs["seconds"]), set(costs["failures"])
        own = {"ddp": {'ShardedEMA, replicas="copy"'}, "fsdp2": {"_foreach_lerp_ on DTensors"}}
        ours = {"ShardedEMA", 'ShardedEMA, kernel="auto"', "_foreach_lerp_ on plain lists"} | own.get(
            costs["case"]["parallel"], set()
        )
        assert works | fails == ours | PEERS | {"copy of as many bytes"}
        assert not works & fails
        assert works >= ours
        assert all(len(seconds) == REPEATS and min(seconds) > 0 for seconds in costs["seconds"].values())
        assert next(iter(costs["times_reference"].items())) == ("copy of as many bytes", 1)
        for counts in ("operators", "moved_bytes", "held_bytes", "extra_bytes", "host_seconds"):
            assert costs[counts].keys() == works - {"copy of as many bytes"}


def test_a_missing_package_is_reported_in_its_row(folder: Path, results: dict[str, Any]) -> None:
    page = (folder / "index.md").read_text().replace("\\_", "_")
    assert all(find_spec(module) for module, name in PACKAGES.items() if results["packages"][name] != "not installed")
    for module, name in PACKAGES.items():
        found = results["packages"][name]
        assert f"{name} {found}" in page
        if find_spec(module) is None:
            assert found == "not installed"
            assert f"not installed: No module named '{module}'" in page


def test_the_error_of_a_peer_is_reported_in_its_row(results: dict[str, Any]) -> None:
    by_case = {(it["case"]["parallel"], it["case"]["live"]): it["failures"] for it in results["updates"]}
    assert "FSDP does not support deepcopy" in by_case["fsdp2", "float32"]["torch AveragedModel, foreach"]
    assert "dtype" in by_case["plain", "bfloat16"]["torch AveragedModel, foreach"]
    assert "torch AveragedModel, foreach" not in by_case["plain", "float32"]


def test_tracks_are_measured_in_the_same_rounds(results: dict[str, Any]) -> None:
    assert [(it["tracks"], it["case"]["parallel"]) for it in results["tracks"]] == 2 * [
        (1, "plain"),
        (2, "plain"),
        (4, "plain"),
    ]
    one, _, four = results["tracks"][:3]
    assert one in results["updates"]  # measured once
    for name in one["held_bytes"].keys() & four["held_bytes"].keys():
        assert four["held_bytes"][name] == 4 * one["held_bytes"][name]


def test_swaps_exports_and_steps_are_measured_on_every_layout(results: dict[str, Any]) -> None:
    layouts = [("plain", 1), ("ddp", 2), ("fsdp2", 2)]
    swapped = [(costs["case"]["parallel"], costs["case"]["ranks"]) for costs in results["swaps"]]
    assert swapped == [layout for layout in layouts for _ in range(2)]
    assert [(costs["case"]["parallel"], costs["case"]["ranks"]) for costs in results["exports"]] == layouts
    assert [(costs["parallel"], costs["ranks"]) for costs in results["steps"]] == layouts
    for swap in results["swaps"]:
        assert swap["held_bytes"]["ShardedEMA.swapped()"] > 0
        for name in swap["held_bytes"]:
            assert len(swap["seconds_in"][name]) == len(swap["seconds_out"][name]) == REPEATS
    for export in results["exports"]:
        assert export["result_bytes"] > export["largest_tensor_bytes"] > 0
    for steps in results["steps"]:
        assert all(0 < share < 1 for share in steps["shares"].values())
        assert steps["seconds"].keys() == steps["shares"].keys() >= {"ShardedEMA"}


def test_steps_are_timed_without_with_and_with_overlapped_updates(results: dict[str, Any]) -> None:
    (costs,) = results["overlap"]
    assert (costs["case"]["parallel"], costs["case"]["ranks"]) == ("fsdp2", 2)
    names = ["no averages", "attach(optimizer)", "attach(optimizer, overlap=True)"]
    assert [*costs["seconds"]] == [*costs["longer"]] == names
    assert all(len(seconds) == REPEATS and min(seconds) > 0 for seconds in costs["seconds"].values())
    assert costs["longer"]["no averages"] == 1


def test_every_target_states_whether_it_was_reached(results: dict[str, Any]) -> None:
    limits = [target["limit"] for target in results["targets"] if target["unit"] == "x"]
    same_dtype, narrow, best_peer, tracks = [1.1] * 6, [0.6] * 4, [0.6] * 2, [2.6] * 2
    on_gpu, auto = [1 / 0.9, 1.01], [1.4] * 4 + [0.9] * 2
    assert sorted(limits) == sorted(same_dtype + narrow + best_peer + tracks + on_gpu + auto)
    assert sum(target["limit"] == 64 for target in results["targets"]) == 3
    for target in results["targets"]:
        if target["measured"] is None:
            assert target["reached"] is False
        else:
            assert target["reached"] is True or target["measured"] > target["limit"]


def test_gpu_targets_are_not_measured_without_a_gpu(folder: Path, results: dict[str, Any]) -> None:
    on_gpu = [target for target in results["targets"] if target["what"].startswith("GPU: ")]
    assert len(on_gpu) == 3
    assert all(target["measured"] is None for target in on_gpu)
    rows = [row for row in (folder / "index.md").read_text().splitlines() if row.startswith("| GPU: ")]
    assert len(rows) == 3
    assert all("not measured" in row for row in rows)


def test_the_page_contains_the_figure(folder: Path) -> None:
    assert "](results.svg)" in (folder / "index.md").read_text()
    assert (folder / "results.svg").read_text().startswith("<svg ")


@pytest.mark.parametrize("live", ["float32", "bfloat16"])
@pytest.mark.parametrize("tracks", [1, 4])
def test_moved_bytes_match_the_passes_of_each_method(live: LiveDtype, tracks: int) -> None:
    """Without what counts calls, a few bytes each, and without the scratch of ours, which stays in the cache."""
    case = Case("plain", 1, SmallTensors(4, 64), live)
    element_sizes = replace(case.element_sizes, tracks=tracks)
    model = case.build_model(torch.device("cpu"))
    live_weights = [parameter.detach() for parameter in model.parameters()]
    elements = sum(weight.numel() for weight in live_weights)
    checked = set()
    for name, make in averaging_methods(case).items():
        with suppress(ImportError, RuntimeError, TypeError):  # missing, or fails: another test
            averager = make(model, DECAYS[:tracks])
            averager.update()
            live_passes, average_passes = PASSES[name][live == "bfloat16"]
            expected = elements * tracks * (live_passes * element_sizes.live_itemsize + average_passes * 4)
            if averager.shares_live_reads:
                expected = update_bytes(elements, element_sizes)
            averages = [average for track in averager.averages() for average in track.values()]
            tensors = [*live_weights, *averages] if name in (OURS, OURS_AUTO) else None
            counted = count_operators(averager.update, tensors=tensors).bytes_moved
            numbers = update_numbers(averager, live_weights, element_sizes, scratch_in_cache=tensors is not None)
            narrow_averages = name == LIGHTNING and live == "bfloat16"
            # Where each track's operator finds the weights.
            in_cache = averager.shares_live_reads and live == "float32" and tracks > 1
            if not narrow_averages:
                assert numbers["moved_bytes"] == pytest.approx(expected, rel=0.01), name
            is_compiled = name == OURS_AUTO  # operators inside of the kernel are not seen
            if not narrow_averages and not in_cache and not is_compiled:
                assert counted == pytest.approx(expected, rel=0.01), name
                checked.add(name)
    assert checked >= {FOREACH, COMPOSER}
    assert OURS in checked or (live == "float32" and tracks > 1)


def test_operators_are_counted_without_views_and_on_local_tensors() -> None:
    weight, other = torch.zeros(10), torch.zeros(10)
    counted = count_operators(lambda: weight.view(2, 5).add_(other.view(2, 5)))
    assert (counted.count, counted.bytes_moved) == (1, 3 * 40)
    counted = count_operators(lambda: weight.copy_(other))
    assert (counted.count, counted.bytes_moved) == (1, 2 * 40)
    assert count_operators(lambda: torch.empty(10)).count == 0
    assert count_operators(lambda: weight + other, tensors=[weight]).bytes_moved == 40


def test_the_page_keeps_its_introduction_and_says_where_it_was_measured(folder: Path, results: dict[str, Any]) -> None:
    page = (folder / "index.md").read_text()
    assert page.startswith("# By hand\n")
    assert "old results" not in page
    assert results["environment"]["command"].startswith("python -m launch.benchmark --")
    assert results["environment"]["command"] in page
    assert f"## Measured on {results['environment']['date']}" in page
    assert page.count("\n### ") == 8
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert all(row.endswith(" |") for row in rows)
    assert sum("ShardedEMA" in row for row in rows) > 20


@needs_stable_storage
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


@needs_stable_storage
def test_targets_of_checkpoints_are_times_of_the_plain_tool_and_memory(checkpoints: dict[str, Any]) -> None:
    times = [target["limit"] for target in checkpoints["targets"] if target["unit"] == "x"]
    memory = [target for target in checkpoints["targets"] if target["unit"] == "MiB"]
    assert sorted(times) == [1.1] * 15 + [1.5] * 2
    assert len(memory) == 2 * (4 + 2 + 1)
    assert all(target["limit"] > 0 for target in memory)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_written_again_from_its_json(folder: Path, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stem, text = ("results", folder / "index.md") if page == "averages" else ("checkpoints", folder / "checkpoints.md")
    files = [text, folder / f"{stem}.json", folder / f"{stem}.svg"]
    before = [file.read_text() for file in files]
    text.write_text(f"{INTRODUCTION}old results\n")
    monkeypatch.setattr(sys, "argv", ["benchmark", "--rewrite", "--only", page, "--output-dir", str(folder)])
    benchmark.main()
    assert [file.read_text() for file in files] == before


def test_pages_not_selected_are_left_unchanged(folder: Path) -> None:
    assert (folder / "composer.md").read_text() == f"{INTRODUCTION}old results\n"
    assert not (folder / "composer.json").exists()


def test_text_below_the_results_is_kept(tmp_path: Path) -> None:
    end = "<!-- Above this line test writes. -->"
    (tmp_path / "page.md").write_text(
        f"# Title\n\n<!-- Below this line test writes. -->\n\nold\n\n{end}\n\n## Method\n"
    )
    page = Page(Environment.here("cpu"), [], {}, [], [], [])
    page.write(tmp_path, data="page.json", page="page.md", program="test")
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# Title\n")
    assert text.endswith(f"{end}\n\n## Method\n")
    assert "old" not in text
