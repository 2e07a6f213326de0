"""What a checkpoint index finds by the names of entries: here, in sharded checkpoints of Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def lightning_index(path: Path, state: dict[str, Any]) -> Any:  # noqa: ANN401
    weights = {name: torch.zeros(2) for name in ("frozen", "weight", "statistics")}
    live = {name: weights[name] for name in ("weight", "statistics")}
    dcp.save({"state_dict": {**weights, "ema_dist_live": live, "ema_dist": state}}, checkpoint_id=path)
    return StoredCheckpoint(path).index


def test_weights_are_averages_or_live_weights_without_an_average(tmp_path: Path) -> None:
    """Buffers are averages of their own, beside the model's; each entry counts its own tensors only."""
    index = lightning_index(
        tmp_path, {"format": 1, "tracks": {"default": {"decay": {}, "buffers": {"statistics": torch.zeros(2)}}}}
    )
    averages, live = ("state_dict", "ema_dist"), ("state_dict", "ema_dist_live")
    assert index.averages[averages]["default"].averages == {"weight": "state_dict.weight"}
    assert index.averages[averages]["default"].buffers.keys() == {"statistics"}
    assert [*index.models[live]] == ["frozen", "weight", "statistics"]
    tensors = {path: len([it for it in names if it in index.tensors]) for path, _, names in index.names_by_entry()}
    assert tensors == {averages: 2, live: 3, ("state_dict",): 1}


@pytest.mark.parametrize("state", [{"tracks": 1}, {"tracks": {}}, {}])
def test_a_state_without_tracks_is_no_average(tmp_path: Path, state: dict[str, Any]) -> None:
    assert not lightning_index(tmp_path, state).averages
