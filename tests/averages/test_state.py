"""What is saved on one layout and world loads on another, and a state that does not fit changes nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from ema_dist import HalfLife, ShardedEMA
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    IGNORED_WARNINGS,
    assert_bitwise_equal,
    full_weights,
    layouts,
    make_net,
    make_trained,
    wrap,
)
from tests.support.reshard_cases import reshard_cases, run_in_world

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


@reshard_cases
def test_a_checkpoint_loads_under_another_layout_and_world(
    source_layout: str, source_ranks: int, target_layout: str, target_ranks: int, tmp_path: Path
) -> None:
    def save() -> None:
        _, ema = make_trained(source_layout, make_net(source_layout, target_layout))
        full = ema.full_state_dict()
        if full:
            torch.save(full, tmp_path / "full.pt")
        dcp.save({"ema": ema}, checkpoint_id=tmp_path / "checkpoint")

    def load() -> None:
        model = wrap(target_layout, make_net(source_layout, target_layout, seed=1))
        ema = ShardedEMA(model, decay=0.8)
        dcp.load({"ema": ema}, checkpoint_id=tmp_path / "checkpoint")
        assert (ema.steps, ema.updates) == (3, 3)
        full = ema.full_state_dict()
        expected = torch.load(tmp_path / "full.pt")
        averaged = {name: value for name, value in expected.items() if not name.startswith("frozen")}
        if full:
            assert_bitwise_equal({name: full[name] for name in averaged}, averaged)
        ema.update()

    run_in_world(source_ranks, tmp_path, save)
    run_in_world(target_ranks, tmp_path, load)


@layouts("plain", "ddp-3", "fsdp1-flat", "fsdp2-4", "hsdp", "fsdp2-tp")
def test_loading_its_own_state_changes_nothing(layout: str) -> None:
    _, ema = make_trained(layout)
    before = ema.full_state_dict()
    ema.load_state_dict(ema.state_dict())
    assert_bitwise_equal(ema.full_state_dict(), before)


@layouts("plain", "ddp", "fsdp1", "fsdp2", "hsdp")
def test_the_state_inside_a_swap_is_the_averages(layout: str, tmp_path: Path) -> None:
    model, ema = make_trained(layout)
    before = ema.full_state_dict()
    with ema.swapped():
        assert_bitwise_equal(ema.full_state_dict(), before)
        dcp.save({"ema": ema}, checkpoint_id=tmp_path)
    live = full_weights(model)
    ema.load_full_state_dict(make_net(layout, seed=1).state_dict())
    dcp.load({"ema": ema}, checkpoint_id=tmp_path)
    assert_bitwise_equal(ema.full_state_dict(), before)
    assert_bitwise_equal(full_weights(model), live)


@layouts("plain", "ddp", "ddp-3", "fsdp1", "fsdp1-flat", "fsdp1-hybrid", "fsdp2-3", "hsdp", "tp", "fsdp2-tp")
def test_full_tensors_scatter_back_into_shards(layout: str) -> None:
    _, ema = make_trained(layout)
    new = make_net(layout, seed=1)
    new.stats.running_mean.fill_(3)
    new.stats.running_var[0] = float("nan")
    weights = new.state_dict() if dist.get_rank() == 0 else None
    ema.load_full_state_dict(weights)  # pyrefly: ignore[bad-argument-type]
    full = ema.full_state_dict()
    if full:
        assert full["stats.running_var"][0].isnan()
        unaveraged = {name: full[name] for name in full if name.startswith(("frozen", "stats.running_var"))}
        for name in weights.keys() - unaveraged.keys():
            assert torch.equal(full[name], weights[name]), name


@layouts("plain", "ddp", "fsdp1", "fsdp2")
def test_full_tensors_of_another_model_change_nothing(layout: str) -> None:
    """Every rank gets the error, though only the first has seen the tensors."""
    _, ema = make_trained(layout)
    before = ema.full_state_dict()
    other = make_net(layout).state_dict()
    other["stranger"] = other.pop("blocks.0.scale")
    with pytest.raises(ValueError, match=r"unknown.*\bstranger\b.*missing.*\bblocks\.0\.scale$"):
        ema.load_full_state_dict(other if dist.get_rank() == 0 else {})
    other = make_net(layout).state_dict() | {"blocks.0.scale": torch.ones(2, 6)}
    with pytest.raises(ValueError, match=r"blocks\.0\.scale\b.*\(1, 6\).*\b2, 6\b"):
        ema.load_full_state_dict(other if dist.get_rank() == 0 else {})
    with pytest.raises(ValueError, match=r"not tensors.*\bblocks\.0\.scale\b"):
        ema.load_full_state_dict(other | {"blocks.0.scale": [1.0]} if dist.get_rank() == 0 else {})
    assert_bitwise_equal(ema.full_state_dict(), before)


@layouts("plain", "fsdp2")
def test_a_state_of_another_model_changes_nothing(layout: str) -> None:
    _, ema = make_trained(layout)
    before = ema.full_state_dict()
    good = ema.state_dict()
    averages = dict(good["tracks"]["default"]["averages"])
    averages["stranger"] = averages.pop("blocks.0.scale")
    bad_names = good | {"tracks": {"default": good["tracks"]["default"] | {"averages": averages}}}
    with pytest.raises(ValueError, match=r"model.*\bblocks\.0\.scale\b.*state.*\bstranger\b"):
        ema.load_state_dict(bad_names)
    averages["blocks.0.scale"] = torch.zeros(5, 6)
    del averages["stranger"]
    with pytest.raises(ValueError, match=r"blocks\.0\.scale\b.*\(1, 6\).*\(5, 6\)"):
        ema.load_state_dict(bad_names)
    with pytest.raises(ValueError, match=r"format.*\b1\b.*\b2\b"):
        ema.load_state_dict(good | {"format": 2})
    assert_bitwise_equal(ema.full_state_dict(), before)


@layouts("plain", "ddp", "fsdp1", "fsdp2")
def test_an_incomplete_state_changes_nothing(layout: str) -> None:
    model, ema = make_trained(layout)
    before = ema.full_state_dict()
    other = ShardedEMA(model, decay=0.8).state_dict()
    for key in ("format", "steps", "updates", "tracks"):
        with pytest.raises(ValueError, match=key):
            ema.load_state_dict({name: value for name, value in other.items() if name != key})
    track = other["tracks"]["default"]
    for key in ("decay", "averages", "buffers"):
        broken = {"default": {name: value for name, value in track.items() if name != key}}
        with pytest.raises(ValueError, match=key):
            ema.load_state_dict(other | {"tracks": broken})
    assert_bitwise_equal(ema.full_state_dict(), before)
    assert ema.steps == 3


@pytest.mark.world_size(2)
def test_sharded_averages_do_not_load_into_full_copies() -> None:
    """Not by itself, that is: DCP reshards it."""
    model, split = make_trained("ddp")
    whole = ShardedEMA(model, decay=0.8, replicas="copy")
    before = whole.full_state_dict()
    with pytest.raises(ValueError, match=r"torch.distributed.checkpoint"):
        whole.load_state_dict(split.state_dict())
    assert_bitwise_equal(whole.full_state_dict(), before)


@layouts("plain", "ddp", "fsdp1", "fsdp2")
def test_loading_inside_a_swap_is_refused_and_loses_nothing(layout: str, tmp_path: Path) -> None:
    model, ema = make_trained(layout)
    dcp.save({"ema": ShardedEMA(model, decay=0.8)}, checkpoint_id=tmp_path)
    before, live = ema.full_state_dict(), full_weights(model)
    with ema.swapped(), pytest.raises(RuntimeError, match=r"load_state_dict\(\).*swapped\(\)"):
        dcp.load({"ema": ema}, checkpoint_id=tmp_path)
    assert_bitwise_equal(ema.full_state_dict(), before)
    assert_bitwise_equal(full_weights(model), live)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=(pytest.mark.world_size(2), *IGNORED_WARNINGS)) for name in ("ddp", "fsdp1")],
)
def test_weights_permuted_in_memory_are_saved_and_loaded(layout: str, tmp_path: Path) -> None:
    """Channels last, transposed; a first dimension of one row, whose stride means nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 5, 1)).to(memory_format=torch.channels_last)
    net.turned = nn.Parameter(torch.randn(10, 6).t())
    wrapper = {
        "ddp": DistributedDataParallel,
        "fsdp1": partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu")),
    }[layout]
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    ema = ShardedEMA(wrapper(net), decay=0.5)
    ema.load_state_dict(ema.state_dict())
    dcp.save({"ema": ema}, checkpoint_id=tmp_path)
    ema.load_full_state_dict({name: torch.zeros_like(value) for name, value in expected.items()})
    dcp.load({"ema": ema}, checkpoint_id=tmp_path)
    full = ema.full_state_dict()
    if full:
        assert_bitwise_equal(full, expected)


@layouts("plain", "fsdp2")
def test_a_checkpoint_of_another_model_loses_nothing(layout: str, tmp_path: Path) -> None:
    """DCP refuses before it reads."""
    _, ema = make_trained(layout)
    before = ema.full_state_dict()
    dcp.save({"ema": ShardedEMA(nn.Linear(2, 2))}, checkpoint_id=tmp_path)
    with pytest.raises((CheckpointException, RuntimeError), match="Missing key"):
        dcp.load({"ema": ema}, checkpoint_id=tmp_path)
    assert_bitwise_equal(ema.full_state_dict(), before)


@pytest.mark.world_size(1)
def test_the_constructor_decides_the_decay_and_says_so(tmp_path: Path) -> None:
    """On load a different saved one is a warning, through DCP as well."""
    dcp.save({"ema": ShardedEMA(nn.Linear(2, 2), decay=0.5)}, checkpoint_id=tmp_path)
    with pytest.warns(UserWarning, match=r"0\.5 -> HalfLife\(10\)"):
        dcp.load({"ema": ShardedEMA(nn.Linear(2, 2), decay=HalfLife(10))}, checkpoint_id=tmp_path)


@pytest.mark.parametrize("layout", [pytest.param("ddp", marks=pytest.mark.world_size(2))])
def test_counts_and_averages_resume_as_without_interruption(layout: str, tmp_path: Path) -> None:
    """The step counter is in the state: `start` and `update_interval` go on where they were (failure 10)."""
    settings = {"decay": 0.5, "start": 2, "update_interval": 2}
    model, ema = make_trained(layout, **settings)
    dcp.save({"ema": ema}, checkpoint_id=tmp_path)
    resumed = ShardedEMA(model, **settings)
    dcp.load({"ema": resumed}, checkpoint_id=tmp_path)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        ema.update()
        resumed.update()
    assert (resumed.steps, resumed.updates) == (ema.steps, ema.updates) == (6, 2)
    assert_bitwise_equal(resumed.full_state_dict(), ema.full_state_dict())


def test_the_state_layout_is_fixed() -> None:
    """DCP, the command line and Composer depend on it."""
    state = ShardedEMA(nn.BatchNorm1d(2), decay=0.5).state_dict()
    averages, buffers = state["tracks"]["default"].pop("averages"), state["tracks"]["default"].pop("buffers")
    assert state == {
        "format": 1,
        "steps": 0,
        "updates": 0,
        "tracks": {
            "default": {
                "decay": {
                    "kind": "constant",
                    "value": '{"law": {"value": 0.5}, "clock": {"steps": 0, "time": 0.0, "start_step": 0, '
                    '"start_time": 0.0, "last_update": 0.0, "initial_mass": 1.0, "last_decay": 0.0}}',
                }
            }
        },
    }
    assert list(averages) == ["weight", "bias"]
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert all(isinstance(tensor, Tensor) for tensor in [*averages.values(), *buffers.values()])
