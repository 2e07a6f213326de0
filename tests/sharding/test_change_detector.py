"""A model that changes after it was read: what moved is followed, and what became another model is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ema_dist import ShardedEMA
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    assert_bitwise_equal,
    full_weights,
    layouts,
    make_net,
    make_trained,
    wrap,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


def test_buffers_that_are_replaced_are_followed() -> None:
    """Modules may register a new tensor in any forward pass; the old one is dead storage."""
    model = nn.BatchNorm1d(3)
    ema = ShardedEMA(model, decay=0.5)
    model.running_mean = torch.full((3,), 4.0)
    ema.update()
    assert torch.equal(ema.full_state_dict()["running_mean"], torch.full((3,), 2.0))


def test_buffers_whose_storage_is_replaced_are_followed() -> None:
    """As FSDP1 does it at the first forward, with a dtype of its own for buffers."""
    model = nn.BatchNorm1d(3)
    ema = ShardedEMA(model, decay=0.5)
    model.running_mean.data = torch.full((3,), 4.0, dtype=torch.bfloat16)
    ema.update()
    assert torch.equal(ema.full_state_dict()["running_mean"], torch.full((3,), 2.0, dtype=torch.bfloat16))


@layouts("plain", "ddp")
def test_weights_that_are_no_longer_tied_are_named(layout: str) -> None:
    """The one that is left would ship its live values (`assign=True` and `to_empty()` do it).

    FSDP2 ties them again in the next forward pass: test_tensors_on_one_storage.py.
    """
    model, ema = make_trained(layout)
    inner = model.module if layout == "ddp" else model
    inner.load_state_dict({name: value.clone() for name, value in inner.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match=r"head\.weight.*tied.*'embed\.weight'"):
        ema.update()


@layouts("plain", "ddp", "fsdp1", "fsdp2", "tp")
def test_averages_follow_weights_that_move_to_other_storage(layout: str) -> None:
    """Views of the old storage would average dead numbers (failure 7)."""
    model, ema = make_trained(layout)
    twin = {name: value.clone() for name, value in full_weights(model).items()}
    before = ema.full_state_dict()
    if layout.startswith("fsdp1"):
        for unit in FullyShardedDataParallel.fsdp_modules(model):
            handle = unit._handle  # noqa: SLF001  as CPU offloading moves it at the first forward
            handle.flat_param._local_shard = handle.flat_param._local_shard.clone()  # noqa: SLF001
            handle.reshard(free_unsharded_flat_param=True)
    else:
        inner = model.module if layout == "ddp" else model
        inner.load_state_dict({name: value.clone() for name, value in inner.state_dict().items()}, assign=True)
        inner.head.weight = inner.embed.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()
    for name, value in ema.full_state_dict().items():
        if name.startswith("blocks"):
            torch.testing.assert_close(value.double(), 0.8 * before[name].double() + 0.2 * (twin[name] + 1))


@layouts("plain", "ddp", "fsdp2")
def test_a_change_of_dtype_is_followed(layout: str) -> None:
    model, ema = make_trained(layout)
    model.to(torch.bfloat16)
    before = ema.full_state_dict(dtype=torch.float32)
    live = full_weights(model)
    ema.update()
    for name, value in ema.full_state_dict(dtype=torch.float32).items():
        if name.startswith("blocks"):
            torch.testing.assert_close(value.double(), 0.8 * before[name].double() + 0.2 * live[name])
    with ema.swapped():
        pass
    assert_bitwise_equal(full_weights(model), live)


@layouts("plain", "ddp", "fsdp2")
def test_a_changed_model_is_named_and_nothing_is_averaged(layout: str) -> None:
    model, ema = make_trained(layout)
    before = ema.full_state_dict()
    net = model.module if layout == "ddp" else model
    original = net.blocks[1].out
    net.blocks[1].out = nn.Sequential(nn.Linear(7, 6))
    with pytest.raises(ValueError, match=r"blocks\.1\.out\.0\.weight.*blocks\.1\.out\.bias"):
        ema.update()
    with pytest.raises(ValueError, match=r"blocks.1.out.0.weight"), ema.swapped():
        pass
    net.blocks[1].out = original
    assert_bitwise_equal(ema.full_state_dict(), before)


@pytest.mark.world_size(2)
def test_a_model_wrapped_after_construction_is_noticed() -> None:
    net = make_net("fsdp2")
    ema = ShardedEMA(net)
    wrap("fsdp2", net)
    with pytest.raises(
        ValueError,
        match=r"blocks\.0\.module\.bias\b.*\bShard\b.*\[0, 1\].*\b17 more\b.*construct",
    ):
        ema.update()


def test_a_parameter_of_another_shape_is_named() -> None:
    model = nn.Linear(2, 3)
    ema = ShardedEMA(model)
    model.weight = nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"weight\b.*\(3, 2\).*\(4, 2\)"):
        ema.update()
