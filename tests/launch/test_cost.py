"""`launch.benchmark.formulas` against torch and against counts by hand; `python -m launch.cost` on a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.benchmark.formulas import (
    Decoder,
    ElementSizes,
    Sharding,
    TrainingStep,
    average_bytes,
    average_elements,
    chunk_rows_of,
    live_elements,
    swap_network_bytes,
    update_bytes,
    update_time_ratio,
)
from tests.support import ROOT

SHAPES = [(7, 3), (1, 5), (8,), (2, 2, 2)]
ELEMENTS = 21 + 5 + 8 + 8


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 7, 8, 9])
def test_rows_match_torch_chunk(rows: int, parts: int) -> None:
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(parts)] if rows else []
    assert [chunk_rows_of(rows, parts, index) for index in range(parts)] == chunks + [0] * (parts - len(chunks))


@pytest.mark.parametrize(
    "sharding", [Sharding(), Sharding(shards=3), Sharding(replicas=4), Sharding(shards=2, replicas=3)]
)
def test_shards_add_up_to_the_model_and_rank_0_has_the_most(sharding: Sharding) -> None:
    parts = [average_elements(SHAPES, sharding, rank) for rank in range(sharding.ranks)]
    assert sum(parts) == ELEMENTS
    assert max(parts) == parts[0]
    lives = [live_elements(SHAPES, sharding, rank) for rank in range(sharding.ranks)]
    assert sum(lives) == sharding.replicas * ELEMENTS


def test_unsharded_averages_have_as_many_elements_as_live_weights() -> None:
    sharding = Sharding(shards=2, replicas=3, split=False)
    for rank in range(sharding.ranks):
        assert average_elements(SHAPES, sharding, rank) == live_elements(SHAPES, sharding, rank)


def test_a_scalar_is_replicated() -> None:
    assert [average_elements([()], Sharding(replicas=3), rank) for rank in range(3)] == [1, 1, 1]


def test_tracks_share_one_read_of_the_live_weights() -> None:
    one, four = ElementSizes(live_itemsize=2, tracks=1), ElementSizes(live_itemsize=2, tracks=4)
    assert average_bytes(10, four) == 4 * average_bytes(10, one) == 160
    assert update_bytes(10, one) == 10 * (2 + 4 + 4)
    assert update_bytes(10, four) == 10 * (2 + 4 * (4 + 4))


def test_a_swap_sends_all_shards_to_all_replicas() -> None:
    checksums = 16 * len(SHAPES)
    padded = 4 * (4 * 3 + 1 * 5 + 4 + 1 * 4)  # the rows of the first replica; the other one has fewer
    assert swap_network_bytes(SHAPES, Sharding(replicas=2), ElementSizes()) == 2 * (padded + 12) + checksums
    padded = 4 * (2 * 3 + 2 + 1 * 4)
    one_row = 4 * 5  # four replicas would pad it to four rows
    assert swap_network_bytes(SHAPES, Sharding(replicas=4), ElementSizes()) == 4 * padded + one_row + 12 + checksums
    assert swap_network_bytes(SHAPES, Sharding(replicas=2, split=False), ElementSizes()) == 0
    assert swap_network_bytes(SHAPES, Sharding(shards=4), ElementSizes()) == 0


def test_the_update_time_ratio_is_independent_of_the_rank_count() -> None:
    step = TrainingStep(tokens=1e6, flops_per_second=4e14, memory_bandwidth=3e12)
    share = update_time_ratio(Sharding(), ElementSizes(live_itemsize=2), step)
    assert math.isclose(share, (10 / 3e12) / (6 * 1e6 / 4e14))
    assert update_time_ratio(Sharding(shards=1024), ElementSizes(live_itemsize=2), step) == share
    assert update_time_ratio(Sharding(replicas=8), ElementSizes(live_itemsize=2), step) == share
    assert update_time_ratio(Sharding(replicas=8, split=False), ElementSizes(live_itemsize=2), step) == 8 * share


def test_published_sizes_give_the_published_number_of_parameters() -> None:
    """Source: the sum of the tensors in the published checkpoint of the 8B model."""
    decoder = Decoder("8B", layers=32, width=4096, hidden=14336, kv_width=1024, vocabulary=128256)
    assert decoder.elements() == 8_030_261_248


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost")
    settings = ["--device", "cpu", "--quick", "--repeats", "2", "--output-dir", folder]
    command = [sys.executable, "-m", "launch.cost", *settings]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


def test_the_page_says_how_to_run_it_again(folder: Path) -> None:
    assert "`python -m launch.cost --device cpu --quick" in (folder / "cost.md").read_text()


@pytest.fixture(scope="module")
def costs(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "cost.json").read_text())["costs"]


def test_formulas_are_checked_on_every_rank_of_every_layout(costs: list[dict[str, Any]]) -> None:
    found = {(it["case"]["parallel"], it["case"]["ranks"], it["sharding"]["split"]) for it in costs}
    assert {(parallel, ranks) for parallel, ranks, _ in found} == {
        ("plain", 1),
        *(("ddp", ranks) for ranks in (2, 4)),
        *(("fsdp2", ranks) for ranks in (1, 2, 4)),
        ("hsdp", 4),
    }
    assert len(found) == 9
    assert len(costs) == 27
    for it in costs:
        for check in ("held_bytes", "moved_bytes", "swap_sent_bytes"):
            assert len(it[check]["formula"]) == it["case"]["ranks"]
            assert it[check]["formula"] == it[check]["measured"]
        assert it["update_sent_bytes"] == 0


def test_the_page_says_what_is_measured_and_what_is_projected(folder: Path) -> None:
    page = (folder / "cost.md").read_text()
    titles = [line for line in page.splitlines() if line.startswith("### ")]
    assert [title.split(":")[0] for title in titles] == ["### Measured"] * 2 + ["### Projected, not measured"] * 2
