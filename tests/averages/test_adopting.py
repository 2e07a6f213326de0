"""Averages that become the live weights while the optimizer goes on: Switch EMA, and a phase that a merge begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ema_dist import ShardedEMA, checkpoint
from ema_dist.checkpoint.weighted_sum.source import open_source
from tests.support.layouts import assert_bitwise_equal, full_weights, layouts, make_net, train_step, wrap

adopting_layouts = layouts("plain", "ddp", "fsdp1", "fsdp1-flat", "fsdp2", "hsdp", "tp", "fsdp2-tp")


def moments(optimizer: Optimizer) -> list[Tensor]:
    """This rank's part of every tensor in the optimizer's state."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [value.to_local() if hasattr(value, "to_local") else value for value in tensors]


def train_with_switches(model: nn.Module, epochs: int) -> dict[str, Tensor]:
    """The oracle, on the unwrapped model: averages kept by hand replace the weights after each epoch of two steps."""
    optimizer = AdamW(model.parameters(), lr=0.01)
    weights = [*dict.fromkeys(model.parameters()), *(b for b in model.buffers() if b.is_floating_point())]
    averages = [tensor.detach().double() for tensor in weights]
    for epoch in range(epochs):
        for number in range(2):
            train_step(model, optimizer, 2 * epoch + number)
            for average, tensor in zip(averages, weights, strict=True):
                average.copy_(torch.where(tensor.isfinite(), 0.5 * average + 0.5 * tensor.detach(), tensor.detach()))
        for average, tensor in zip(averages, weights, strict=True):
            tensor.data.copy_(average)
    return full_weights(model)


@adopting_layouts
def test_switch_ema_is_the_same_on_every_layout(layout: str) -> None:
    """The weights are the averages after each epoch; the moments stay as they are, in the same memory."""
    model = wrap(layout, make_net(layout))
    optimizer = AdamW(model.parameters(), lr=0.01)
    ema = ShardedEMA(model, decay=0.5)
    ema.attach(optimizer)
    for epoch in range(3):
        for number in range(2):
            train_step(model, optimizer, 2 * epoch + number)
        before = [(value.data_ptr(), value.clone()) for value in moments(optimizer)]
        with ema.swapped():
            averages = full_weights(model)
        ema.copy_to(ema.model)
        assert_bitwise_equal(full_weights(model), averages)
        after = moments(optimizer)
        assert before
        assert all(
            value.data_ptr() == pointer and torch.equal(value, copy)
            for value, (pointer, copy) in zip(after, before, strict=True)
        )
        assert (ema.steps, ema.distance()) == (2 * (epoch + 1), 0)
    torch.testing.assert_close(full_weights(model), train_with_switches(make_net(layout), 3), rtol=1e-3, atol=1e-4)


@adopting_layouts
@pytest.mark.parametrize("file_format", ["dcp", "safetensors"])
def test_training_resumes_from_a_merge(layout: str, file_format: str, tmp_path: Path) -> None:
    """As launch/train.py --start-from does: the merge becomes live weights and averages, and training goes on."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        for seed in range(2):
            state = {name: tensor.clone() for name, tensor in make_net(layout, seed=seed).state_dict().items()}
            save_file(state, tmp_path / f"{seed}.safetensors")
    if dist.is_initialized():
        dist.barrier()
    sources = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    checkpoint.merge(sources, tmp_path / "merged", file_format=file_format)
    source = open_source(tmp_path / "merged", "live")
    merged = dict(zip(source.meta_tensors, source.read(source.meta_tensors), strict=True))
    model = wrap(layout, make_net(layout, seed=7))
    optimizer = AdamW(model.parameters(), lr=0.01)
    ema = ShardedEMA(model, decay=0.5)
    ema.attach(optimizer)
    train_step(model, optimizer, 0)
    before = [value.clone() for value in moments(optimizer)]
    if file_format == "dcp":
        checkpoint.load({"model": model}, tmp_path / "merged")
    else:
        checkpoint.scatter(ema, tmp_path / "merged")
        ema.copy_to(ema.model)
    ema.reset()
    live = full_weights(model)
    averaged = {name for name in merged if "frozen" not in name and "num_batches" not in name}
    names = merged.keys() if file_format == "dcp" else averaged
    assert_bitwise_equal({name: live[name] for name in names}, {name: merged[name] for name in names})
    assert all(torch.equal(value, copy) for value, copy in zip(moments(optimizer), before, strict=True))
    assert (ema.steps, ema.distance()) == (0, 0)
    train_step(model, optimizer, 1)
    assert ema.distance() > 0
