"""How much a decay weighs an update, and which steps are averaged."""

from __future__ import annotations

import math

import pytest
from torch import nn

from ema_dist import HalfLife, ShardedEMA


@pytest.mark.parametrize(
    ("decay", "expected"), [(HalfLife(0), 8.0), (HalfLife(math.inf), 0.0), (0.0, 8.0), (1.0, 0.0), (HalfLife(1), 6.0)]
)
def test_decay_0_and_decay_1(decay: HalfLife | float, expected: float) -> None:
    """No averaging, and no update."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ShardedEMA(model, decay=decay)
    nn.init.constant_(model.weight, 8.0)
    ema.update()
    ema.update()
    assert ema.full_state_dict()["weight"].item() == expected


def test_start_follows_and_interval_corrects_the_half_life() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ShardedEMA(model, decay=HalfLife(2), start=2, update_interval=4)
    seen = []
    for value in (1.0, 2.0, 8.0, 8.0, 8.0, 8.0, 8.0, 16.0):
        nn.init.constant_(model.weight, value)
        ema.update()
        seen.append(ema.full_state_dict()["weight"].item())
    assert seen == [1.0, 2.0, 2.0, 6.5, 6.5, 6.5, 6.5, 13.625]
    assert (ema.steps, ema.updates) == (8, 2)


def test_a_half_life_is_not_negative() -> None:
    with pytest.raises(ValueError, match=r"half-life.*\b0\b.*-1\b"):
        HalfLife(-1)


def test_a_decay_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match=r"'0\.9'"):
        ShardedEMA(nn.Linear(2, 2), decay="0.9")  # pyrefly: ignore[bad-argument-type]
