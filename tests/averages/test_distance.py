"""How far an average is from the live weights, over all ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ema_dist import Compensated, HalfLife, Offloaded, ShardedEMA
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    STORAGE_LAYOUTS,
    full_weights,
    layouts,
    make_net,
    make_trained,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


def expected_distance(model: nn.Module, ema: ShardedEMA, track: str, names: list[str]) -> float:
    """Over full tensors, as torch gathers them."""
    live = full_weights(model)  # on every rank
    averages = [ema.full_state_dict(track=track, dtype=torch.float64)]
    if dist.is_initialized():
        dist.broadcast_object_list(averages)
    difference = sum((averages[0][name] - live[name]).square().sum().item() for name in names)
    return math.sqrt(difference / sum(live[name].square().sum().item() for name in names))


@layouts(*STORAGE_LAYOUTS)
@pytest.mark.parametrize("replicas", ["shard", "copy"])
def test_the_distance_is_that_of_the_full_tensors(layout: str, replicas: str) -> None:
    model, ema = make_trained(layout, replicas=replicas, decay={"near": HalfLife(1), "far": HalfLife(50)})
    # Tied tensors once; neither frozen parameters nor buffers.
    names = [name for name, parameter in make_net(layout).named_parameters() if parameter.requires_grad]
    near, far = ema.distance("near"), ema.distance("far")
    assert 0 < near < far
    assert near == pytest.approx(expected_distance(model, ema, "near", names), rel=1e-6)
    assert far == pytest.approx(expected_distance(model, ema, "far", names), rel=1e-6)


SETTINGS: dict[str, dict[str, Any]] = {
    "stochastic": {"dtype": torch.bfloat16},
    "hi/lo": {"dtype": torch.bfloat16, "rounding": Compensated()},
    "offloaded": {"store": Offloaded()},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_distance_of_averages_in_other_dtypes(setting: str) -> None:
    model = nn.Linear(3, 2, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    ema = ShardedEMA(model, decay=0.75, **SETTINGS[setting])
    nn.init.constant_(model.weight, 2)
    ema.update()
    assert ema.distance() == (2 - 1.25) / 2


def test_equal_infinities_and_a_model_of_zeros() -> None:
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, -math.inf)
    nn.init.zeros_(model.bias)
    ema = ShardedEMA(model, decay=0.5)
    assert ema.distance() == 0.0
    nn.init.ones_(model.bias)
    ema.update()
    assert ema.distance() == 0.5
    nn.init.zeros_(model.bias)
    assert ema.distance() == math.inf


def test_the_distance_is_refused_where_the_model_holds_the_averages() -> None:
    ema = ShardedEMA(nn.Linear(1, 1))
    with ema.swapped(), pytest.raises(RuntimeError, match=r"distance\(\) inside swapped"):
        ema.distance()
    with pytest.raises(ValueError, match=r"'default'.*'other'"):
        ema.distance("other")


@pytest.mark.world_size(2)
def test_the_distance_takes_one_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    ema = ShardedEMA(DistributedDataParallel(nn.Linear(4, 4)))
    calls: list[object] = []
    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: calls.append(args) or all_reduce(*args, **kwargs))
    ema.distance()
    assert len(calls) == 1
