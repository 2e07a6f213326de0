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
    Kept,
    Passes,
    Spread,
    Step,
    average_bytes,
    average_elements,
    live_elements,
    rows_of,
    share_of_step,
    swap_network_bytes,
    update_bytes,
)
from tests.support import ROOT

SHAPES = [(7, 3), (1, 5), (8,), (2, 2, 2)]
ELEMENTS = 21 + 5 + 8 + 8


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 7, 8, 9])
def test_rows_are_cut_as_torch_cuts_them(rows: int, parts: int) -> None:
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(parts)] if rows else []
    assert [rows_of(rows, parts, place) for place in range(parts)] == chunks + [0] * (parts - len(chunks))


@pytest.mark.parametrize("spread", [Spread(), Spread(shards=3), Spread(replicas=4), Spread(shards=2, replicas=3)])
def test_parts_of_all_ranks_are_the_whole_model_and_the_first_rank_has_the_most(spread: Spread) -> None:
    parts = [average_elements(SHAPES, spread, rank) for rank in range(spread.ranks)]
    assert sum(parts) == ELEMENTS
    assert max(parts) == parts[0]
    lives = [live_elements(SHAPES, spread, rank) for rank in range(spread.ranks)]
    assert sum(lives) == spread.replicas * ELEMENTS


def test_averages_that_are_not_split_are_as_many_as_the_live_weights() -> None:
    spread = Spread(shards=2, replicas=3, split=False)
    for rank in range(spread.ranks):
        assert average_elements(SHAPES, spread, rank) == live_elements(SHAPES, spread, rank)


def test_a_scalar_is_whole_on_every_replica() -> None:
    assert [average_elements([()], Spread(replicas=3), rank) for rank in range(3)] == [1, 1, 1]


def test_tracks_share_the_reading_of_live_weights() -> None:
    one, four = Kept(live_width=2, tracks=1), Kept(live_width=2, tracks=4)
    assert average_bytes(10, four) == 4 * average_bytes(10, one) == 160
    assert update_bytes(10, one) == 10 * (2 + 4 + 4)
    assert update_bytes(10, four) == 10 * (2 + 4 * (4 + 4))
    assert Passes(live=1, average=2).bytes(10, one) == update_bytes(10, one)
    assert Passes(live=1, average=2).bytes(10, four) == 4 * update_bytes(10, one)


def test_a_swap_sends_every_part_past_every_replica_and_nothing_where_nothing_is_split() -> None:
    checksums = 8 * len(SHAPES) * 2
    assert swap_network_bytes(SHAPES, Spread(replicas=2), Kept()) == 4 * ELEMENTS + checksums
    assert swap_network_bytes(SHAPES, Spread(replicas=2, split=False), Kept()) == 0
    assert swap_network_bytes(SHAPES, Spread(shards=4), Kept()) == 0


def test_the_share_of_a_step_does_not_depend_on_the_number_of_ranks() -> None:
    step = Step(tokens=1e6, operations_per_second=4e14, memory_bandwidth=3e12)
    share = share_of_step(Spread(), Kept(live_width=2), step)
    assert math.isclose(share, (10 / 3e12) / (6 * 1e6 / 4e14))
    assert share_of_step(Spread(shards=1024), Kept(live_width=2), step) == share
    assert share_of_step(Spread(replicas=8), Kept(live_width=2), step) == share
    assert share_of_step(Spread(replicas=8, split=False), Kept(live_width=2), step) == 8 * share


def test_published_sizes_give_the_published_number_of_parameters() -> None:
    """Source: the sum of the tensors in the published checkpoint of the 8B model."""
    decoder = Decoder("8B", layers=32, width=4096, hidden=14336, key_width=1024, vocabulary=128256)
    assert decoder.elements() == 8_030_261_248


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost")
    settings = ["--device", "cpu", "--quick", "--repeats", "2", "--output-dir", folder]
    command = [sys.executable, "-m", "launch.cost", *settings]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.fixture(scope="module")
def costs(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "cost.json").read_text())["costs"]


def test_formulas_are_checked_on_every_rank_of_every_layout(costs: list[dict[str, Any]]) -> None:
    found = {(it["case"]["parallel"], it["case"]["ranks"], it["spread"]["split"]) for it in costs}
    assert {(parallel, ranks) for parallel, ranks, _ in found} == {
        ("plain", 1),
        *(("ddp", ranks) for ranks in (2, 4)),
        *(("fsdp2", ranks) for ranks in (1, 2, 4)),
        ("hsdp", 4),
    }
    assert len(found) == 9
    assert len(costs) == 27
    for it in costs:
        for check in ("held", "moved", "sent"):
            assert len(it[check]["formula"]) == it["case"]["ranks"]
            assert it[check]["formula"] == it[check]["measured"]
        assert it["sent_by_update"] == 0


def test_the_page_says_what_is_measured_and_what_is_projected(folder: Path) -> None:
    page = (folder / "cost.md").read_text()
    titles = [line for line in page.splitlines() if line.startswith("### ")]
    assert [title.split(":")[0] for title in titles] == ["### Measured"] * 2 + ["### Projected, not measured"] * 2
