"""Inside `serving` forward passes read the averages, and the live weights stay where and what they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ema_dist import ShardedEMA
from layouts import assert_bitwise_equal, evaluate, full_weights, layouts, make_net, trained

SERVED = (
    "plain", "ddp", "ddp-3", "fsdp2", "fsdp2-1", "fsdp2-3", "fsdp2-4", "fsdp2-root", "fsdp2-keep", "hsdp", "tp", "fsdp2-tp",
    "ddp-checkpointed", "fsdp2-checkpointed", "plain-compiled", "ddp-compiled", "fsdp2-compiled", "tp-compiled",
)  # fmt: skip
"""Layouts that need no swap."""


@layouts(*SERVED)
def test_a_forward_pass_inside_computes_what_it_computes_when_swapped(layout: str) -> None:
    """And before and after it the same as ever."""
    model, ema = trained(layout)
    live = full_weights(model)
    before = evaluate(model)
    with ema.swapped():
        swapped = evaluate(model)
    for _ in range(2):
        with ema.serving() as served:
            assert served is model
            inside = evaluate(model)
        assert torch.equal(inside, swapped)
        assert torch.equal(evaluate(model), before)
    assert not torch.equal(inside, before)
    assert_bitwise_equal(full_weights(model), live)
    ema.update()
