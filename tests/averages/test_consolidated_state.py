"""Files that one rank writes hold all averages; the state of one rank cannot be written, and loads on no other."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from ema_dist import Compensated, ShardedEMA
from ema_dist.sharding import local_tensor
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    assert_bitwise_equal,
    averages_of_tracks,
    layouts,
    make_net,
    make_trained,
    wrap,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


SHARDED = ("ddp-3", "fsdp1", "fsdp2", "fsdp2-3", "hsdp", "fsdp2-tp")


@layouts("plain", *SHARDED)
def test_the_consolidated_state_loads_on_the_first_rank_or_on_all(layout: str, tmp_path: Path) -> None:
    _, ema = make_trained(layout, decay={"a": 0.5, "b": 0.9})
    expected, path = averages_of_tracks(ema), tmp_path / "ema.pt"
    state = ema.consolidated_state_dict()
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    assert bool(state) == is_first
    if is_first:
        torch.save(state, path)
    with ema.swapped("a"):
        inside = ema.consolidated_state_dict()
    if is_first:
        for track, entry in state["tracks"].items():
            assert_bitwise_equal(inside["tracks"][track]["averages"], entry["averages"])

    def make() -> ShardedEMA:
        return ShardedEMA(wrap(layout, make_net(layout)), decay={"a": 0.5, "b": 0.9})

    from_first, from_all = make(), make()
    from_first.load_consolidated_state_dict(torch.load(path) if is_first else {})
    if dist.is_initialized():
        dist.barrier()
    from_all.load_state_dict(torch.load(path))
    for loaded in (from_first, from_all):
        assert (loaded.steps, loaded.updates) == (ema.steps, ema.updates)
        assert_bitwise_equal(averages_of_tracks(loaded), expected)
        loaded.update()


@pytest.mark.world_size(2)
def test_compensated_averages_are_consolidated_as_float32() -> None:
    _, ema = make_trained("fsdp2", dtype=torch.bfloat16, rounding=Compensated())
    state = ema.consolidated_state_dict()
    for average in state["tracks"]["default"]["averages"].values() if state else ():
        assert average.dtype == torch.float32
    before = averages_of_tracks(ema)
    ema.load_consolidated_state_dict(state)
    assert_bitwise_equal(averages_of_tracks(ema), before)


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("empty", "consolidated_state_dict"),
        ("incomplete", "format"),
        ("name", r"blocks\.0\.out\.weight.*other"),
        ("shape", r"blocks\.0\.out\.weight .*\(1, "),
        ("dtype", r"blocks\.0\.out\.weight .*floating.*integer"),
        ("sharded", "full tensors"),
        ("not picklable", "pickle"),
    ],
)
def test_a_consolidated_state_that_does_not_fit_changes_nothing(change: str, words: str) -> None:
    """An error on every rank, though only the first one has the state."""
    _, ema = make_trained("fsdp2")
    before = averages_of_tracks(ema)
    sharded, state = ema.state_dict(), ema.consolidated_state_dict()
    if state:
        averages, name = state["tracks"]["default"]["averages"], "blocks.0.out.weight"
        match change:
            case "empty":
                state = {}
            case "incomplete":
                state = {"tracks": state["tracks"]}
            case "name":
                averages["other"] = averages.pop(name)
            case "shape":
                averages[name] = averages[name][:1]
            case "dtype":
                averages[name] = averages[name].long()
            case "sharded":
                state = sharded
            case _:
                state["more"] = lambda: None
    with pytest.raises((ValueError, RuntimeError), match=words):
        ema.load_consolidated_state_dict(state)
    assert_bitwise_equal(averages_of_tracks(ema), before)


@layouts(*SHARDED)
def test_a_sharded_state_is_not_pickled(layout: str, tmp_path: Path) -> None:
    """DCP goes on reading and writing it, also in the background."""
    _, ema = make_trained(layout)
    state = ema.state_dict()
    for part in (state, state["tracks"], state["tracks"]["default"], state["tracks"]["default"]["averages"]):
        for write in (pickle.dumps, lambda value: torch.save(value, io.BytesIO())):
            with pytest.raises(TypeError, match="consolidated_state_dict"):
                write(part)
    assert type(copy.copy(state)) is type(state)
    copied = copy.deepcopy(state)
    for part in (copied, copied["tracks"], copied["tracks"]["default"]["averages"]):
        assert type(part) is dict  # which DCP's stagers pickle
    dcp.save({"ema": state}, checkpoint_id=tmp_path / "saved")
    dcp.async_save({"ema": state}, checkpoint_id=tmp_path / "saved in the background").result()
    expected = averages_of_tracks(ema)
    for folder in tmp_path.iterdir():
        other = ShardedEMA(wrap(layout, make_net(layout)), decay=0.8)
        loaded = {"ema": other.state_dict()}
        dcp.load(loaded, checkpoint_id=folder)
        other.load_state_dict(loaded["ema"])
        assert_bitwise_equal(averages_of_tracks(other), expected)


@layouts("fsdp2")
def test_a_deep_copy_does_not_change_with_later_updates(layout: str) -> None:
    _, ema = make_trained(layout)
    averages = ema.state_dict()["tracks"]["default"]["averages"]
    copied = copy.deepcopy(ema.state_dict())["tracks"]["default"]["averages"]
    expected = {name: local_tensor(value).clone() for name, value in averages.items()}
    ema.update()
    assert_bitwise_equal({name: local_tensor(value) for name, value in copied.items()}, expected)
    assert not all(torch.equal(local_tensor(value), expected[name]) for name, value in averages.items())


def test_the_state_of_one_rank_alone_is_pickled() -> None:
    model = nn.Linear(2, 2)
    ema, other = ShardedEMA(model), ShardedEMA(nn.Linear(2, 2))
    other.load_state_dict(pickle.loads(pickle.dumps(ema.state_dict())))
    assert_bitwise_equal(averages_of_tracks(other), averages_of_tracks(ema))


@layouts("ddp-3", "fsdp2-3", "hsdp")
def test_the_part_of_another_rank_is_refused(layout: str) -> None:
    _, ema = make_trained(layout)
    before = averages_of_tracks(ema)
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(ema.state_dict()), buffer)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, buffer.getvalue())
    other = torch.load(io.BytesIO(parts[dist.get_rank() - 1]), weights_only=False)
    coordinate = (dist.get_rank() - 1) % dist.get_world_size()
    with pytest.raises(ValueError, match="weight .*the part at" if layout == "hsdp" else rf"part at .*\({coordinate},"):
        ema.load_state_dict(other)
    dist.barrier()
    assert_bitwise_equal(averages_of_tracks(ema), before)
