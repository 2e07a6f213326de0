"""What the average still holds of the weights at which averaging began, what one logs, and beginning anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ema_dist import Compensated, Cosine, HalfLife, Offloaded, ShardedEMA, Uniform, Warmup
from tests.schedules.laws import LAWS
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    assert_bitwise_equal,
    averages_of_tracks,
    layouts,
    make_trained,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


@pytest.mark.parametrize(("start", "interval"), [(0, 1), (4, 3)])
def test_the_initial_mass_is_the_share_of_the_first_weights(start: int, interval: int) -> None:
    """Averages of a weight that is 1 where averaging begins, and 0 after that, are the initial mass."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    ema = ShardedEMA(model, decay=LAWS, start=start, update_interval=interval)
    assert {ema.initial_mass(name) for name in LAWS} == {1.0}
    for step in range(1, 30):
        if step > start:
            nn.init.zeros_(model.weight)
        ema.update()
        for name in LAWS:
            average = ema.full_state_dict(track=name)["weight"].item()
            assert ema.initial_mass(name) == pytest.approx(average, rel=1e-9, abs=1e-12)


def test_the_initial_mass_of_an_unknown_track() -> None:
    with pytest.raises(ValueError, match=r"'default'.*'other'"):
        ShardedEMA(nn.Linear(1, 1)).initial_mass("other")


def test_metrics_are_numbers_to_log() -> None:
    ema = ShardedEMA(nn.Linear(1, 1), decay={"a": HalfLife(200), "b": Warmup()}, start=50)
    ema.update(elapsed=50)
    following = {"ema/steps": 1, "ema/time": 50.0, "ema/a/decay": 0.0, "ema/a/initial_mass": 1.0}
    assert ema.metrics() == following | {"ema/b/decay": 0.0, "ema/b/initial_mass": 1.0}
    ema.update(elapsed=100)
    ema.update(elapsed=100)
    assert ema.metrics() == {
        "ema/steps": 3,
        "ema/time": 250.0,
        "ema/a/decay": pytest.approx(0.5**0.5),
        "ema/a/initial_mass": pytest.approx(0.5),
        "ema/b/decay": pytest.approx(2 / 11),
        "ema/b/initial_mass": 0.0,
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "stochastic": {"dtype": torch.bfloat16},
    "hi/lo": {"dtype": torch.bfloat16, "rounding": Compensated()},
    "offloaded": {"store": Offloaded()},
    "tracks": {"decay": {"a": Uniform(), "b": Cosine(0.9, 1, 10)}},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_reset_equals_a_new_construction(setting: str) -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).bfloat16()
    ema = ShardedEMA(model, **SETTINGS[setting])
    for _ in range(3):
        nn.init.normal_(model[0].weight)
        ema.update(elapsed=7)
    nn.init.constant_(model[0].bias, float("inf"))
    model[1].running_mean.fill_(3)
    ema.reset()
    fresh = ShardedEMA(model, **SETTINGS[setting])
    for _ in range(2):
        assert ema.metrics() == fresh.metrics()
        assert (ema.steps, ema.updates, ema.time) == (fresh.steps, fresh.updates, fresh.time)
        assert_bitwise_equal(averages_of_tracks(ema), averages_of_tracks(fresh))
        nn.init.normal_(model[0].weight)
        ema.update(elapsed=7)
        fresh.update(elapsed=7)


@layouts("ddp", "fsdp1-flat", "fsdp2", "hsdp", "tp")
def test_reset_follows_weights_that_were_loaded_after_construction(layout: str) -> None:
    """Without a word to the other ranks, which may compare calls afterwards."""
    model, ema = make_trained(layout)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(3)
    ema.reset()
    for name, value in ema.full_state_dict().items():
        assert not name.startswith("blocks") or bool((value == 3).all()), name
    assert (ema.steps, ema.updates, ema.time, ema.initial_mass()) == (0, 0, 0.0, 1.0)


def test_reset_is_refused_where_the_model_holds_the_averages() -> None:
    ema = ShardedEMA(nn.Linear(1, 1))
    ema.update()
    with ema.swapped(), pytest.raises(RuntimeError, match=r"reset\(\) inside swapped"):
        ema.reset()
    assert ema.steps == 1
