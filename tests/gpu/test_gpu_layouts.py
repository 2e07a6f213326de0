"""Every layout on the device: ranks share the one GPU through gloo, so that only NCCL itself is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_dist import Compensated, Offloaded, ShardedEMA, checkpoint
from tests.support.layouts import (
    STORAGE_LAYOUTS,
    assert_bitwise_equal,
    evaluate,
    full_weights,
    layouts,
    make_net,
    train_step,
    wrap,
)

SETTINGS = {
    "in place": {},
    "offloaded": {"store": Offloaded()},
    "compensated": {"dtype": torch.bfloat16, "rounding": Compensated()},
    "two tracks": {"decay": {"default": 0.75, "slow": 0.99}},
}


def make_model(layout: str) -> nn.Module:
    return wrap(layout, make_net(layout).to("cuda"))


@pytest.mark.gpu(shared=True)
@layouts(*STORAGE_LAYOUTS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_averages_are_those_of_a_float64_reference_in_every_call(layout: str, settings: str, tmp_path: Path) -> None:
    """Update, swap, serve, gather, save in both ways, load, and load full tensors."""
    arguments: dict[str, Any] = {"decay": 0.75} | SETTINGS[settings]
    model, other_model = make_model(layout), make_model(layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ema, again = ShardedEMA(model, **arguments), ShardedEMA(other_model, **arguments)
    averaged = [name for name in full_weights(model) if "frozen" not in name and "num_batches" not in name]
    reference = full_weights(model)
    for step in range(3):
        train_step(model, optimizer, step)
        ema.update()
        live = full_weights(model)
        reference = {name: 0.75 * reference[name] + 0.25 * live[name] for name in averaged}
    full = ema.full_state_dict(dtype=torch.float32)
    for name in averaged if full else []:
        torch.testing.assert_close(full[name].double(), reference[name].cpu(), rtol=1e-5, atol=1e-6, equal_nan=True)
    live = full_weights(model)
    with ema.swapped(), torch.no_grad():
        inside, swapped_output = full_weights(model), evaluate(model)
    for name in averaged if full else []:
        torch.testing.assert_close(inside[name].cpu().float(), full[name], rtol=0, atol=0, equal_nan=True)
    with ema.serving(), torch.no_grad():
        torch.testing.assert_close(evaluate(model), swapped_output)
    assert_equal_with_nan(full_weights(model), live)
    for block, step in ((True, 3), (False, 4)):
        checkpoint.save({"model": model, "ema": ema}, tmp_path, step=step, block=block)
    checkpoint.wait()
    checkpoint.load({"ema": again}, tmp_path)
    assert_equal_with_nan(again.full_state_dict(dtype=torch.float32), full)
    again.load_full_state_dict(full)
    assert_equal_with_nan(again.full_state_dict(dtype=torch.float32), full)


def assert_equal_with_nan(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert_bitwise_equal(
        {name: value.cpu().nan_to_num(7) for name, value in actual.items()},
        {name: value.cpu().nan_to_num(7) for name, value in expected.items()},
    )


@pytest.mark.gpu(shared=True)
@layouts("ddp", "fsdp1", "fsdp2-3", "hsdp", "tp")
def test_parts_are_sent_from_a_device_with_its_index(layout: str) -> None:
    ema = ShardedEMA(make_model(layout), decay=0.5, store=Offloaded())
    shards = ema._live.layout.shards  # noqa: SLF001
    devices = {part.communication_device for shard in shards for part in (shard, shard.averaged_part)}
    assert devices == {torch.device("cuda", 0)}
