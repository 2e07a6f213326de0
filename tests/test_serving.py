"""Inside `serving` forward passes read the averages, and the live weights stay where and what they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ema_dist import ShardedEMA, checkpoint
from ema_dist.serving import CAST, GATHERED, THEMSELVES
from ema_dist.shards import fsdp2
from layouts import (
    TORCH_WARNS,
    assert_bitwise_equal,
    evaluate,
    full_weights,
    layouts,
    make_net,
    peak_memory,
    train_step,
    trained,
    wrap,
)

SERVED = (
    *("plain", "ddp", "ddp-3", "fsdp2", "fsdp2-1", "fsdp2-3", "fsdp2-4", "fsdp2-root", "fsdp2-keep", "hsdp", "tp"),
    *("fsdp2-tp", "ddp-checkpointed", "fsdp2-checkpointed", "plain-compiled", "ddp-compiled", "fsdp2-compiled"),
    "tp-compiled",
)
"""Layouts whose averages are served without a swap."""

TENSOR_PARALLEL = ("tp", "fsdp2-tp", "tp-compiled")
"""Layouts that add up in another order than the unwrapped model."""


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local_state(model: nn.Module) -> dict[str, Tensor]:
    """This rank's part of everything that ``state_dict()`` holds."""
    return {name: local(tensor) for name, tensor in model.state_dict().items()}


def batch(seed: int = 7) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


@layouts(*SERVED)
def test_a_forward_pass_inside_computes_with_the_averages(layout: str) -> None:
    """As the unwrapped model does that has them loaded; and before and after it as if nothing had happened."""
    model, ema = trained(layout)
    live = full_weights(model)
    before = evaluate(model)
    with ema.swapped():
        swapped = evaluate(model)
    for _ in range(2):
        with ema.serving() as served:
            assert served is model
            assert not torch.is_grad_enabled()
            inside = evaluate(model)
        assert torch.equal(inside, swapped)
        assert torch.equal(evaluate(model), before)
    assert not torch.equal(inside, before)
    assert_bitwise_equal(full_weights(model), live)
    if full := ema.full_state_dict():
        net = make_net(layout)
        net.load_state_dict(full)
        tolerance = 1e-5 if layout in TENSOR_PARALLEL else 0
        torch.testing.assert_close(inside, evaluate(net), rtol=tolerance, atol=tolerance)
    ema.update()


@layouts(*SERVED)
def test_gradients_with_a_teacher_are_those_without_one_to_the_bit(layout: str) -> None:
    """Between forward and backward of a live graph, in training mode: the live statistics are the same as well."""

    def gradients(serving: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:  # noqa: FBT001
        model, ema = trained(layout)
        averages = ema.full_state_dict()
        for step in range(2):
            output = model(batch(step))
            if serving:
                with ema.serving():
                    model(batch(step + 2))
                    model(batch(step + 4))
            output.square().mean().backward()
        kept = ema.full_state_dict()
        assert_bitwise_equal(kept, averages)
        found = {name: local(it.grad) for name, it in model.named_parameters() if it.grad is not None}
        return found, local_state(model), kept

    with_teacher, without = gradients(serving=True), gradients(serving=False)
    for found, expected in zip(with_teacher, without, strict=True):
        assert_bitwise_equal(found, expected)
    assert len(with_teacher[0]) == 17


@layouts("ddp", "fsdp2-3", "hsdp", "tp")
def test_training_goes_on_as_without_a_teacher(layout: str) -> None:
    def weights(serving: bool) -> dict[str, Tensor]:  # noqa: FBT001
        model, ema = trained(layout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for step in range(3, 6):
            if serving:
                with ema.serving():
                    model(batch(step))
            train_step(model, optimizer, step)
            ema.update()
        return local_state(model)

    assert_bitwise_equal(weights(serving=True), weights(serving=False))


@layouts("plain", "ddp", "fsdp2-3", "hsdp", "tp", "plain-compiled")
def test_state_dicts_taken_inside_hold_the_live_weights(layout: str) -> None:
    """Of the model and of a part of it, by torch's own means; the averages are served again after that."""
    model, ema = trained(layout)
    live, gathered = local_state(model), full_weights(model)
    part = next(module for name, module in model.named_modules() if name.endswith("blocks.1"))
    live_part = local_state(part)
    with ema.serving():
        inside = evaluate(model)
        assert_bitwise_equal(local_state(model), live)
        assert_bitwise_equal(local_state(part), live_part)
        assert_bitwise_equal({name: local(it) for name, it in part.state_dict(keep_vars=True).items()}, live_part)
        assert_bitwise_equal(full_weights(model), gathered)
        state = get_model_state_dict(model)
        assert [name for name in gathered if name not in state] == []
        assert torch.equal(evaluate(model), inside)
    for module in model.modules():
        hooks = (module._state_dict_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks)  # noqa: SLF001
        assert [key for its in hooks for key in its if key == "ema_dist"] == []


@layouts("plain", "ddp", "fsdp2-3", "hsdp", "tp")
def test_the_averages_can_be_gathered_and_saved_inside(layout: str, tmp_path: Path) -> None:
    model, ema = trained(layout)
    optimizer = torch.optim.AdamW(model.parameters())
    full, live = ema.full_state_dict(), full_weights(model)
    with ema.serving():
        inside = evaluate(model)
        assert_bitwise_equal(ema.full_state_dict(), full)
        assert_bitwise_equal({name: value for name, value in ema.gather() if full}, full)
        ema.check_replicas()
        checkpoint.save({"model": model, "optim": optimizer, "ema": ema}, shared(tmp_path), step=1)
        assert torch.equal(evaluate(model), inside)
        with pytest.raises(RuntimeError, match=r"inside serving\(\).*after the block"):
            checkpoint.load({"model": model, "optim": optimizer, "ema": ema}, shared(tmp_path))
    ema.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    checkpoint.load({"model": model, "optim": optimizer, "ema": ema}, shared(tmp_path))
    assert_bitwise_equal(full_weights(model), live)
    assert_bitwise_equal(ema.full_state_dict(), full)


def shared(folder: Path) -> Path:
    """The first rank's."""
    told = [folder]
    dist.broadcast_object_list(told, src=0)
    return told[0]


@pytest.mark.parametrize("replicas", ["shard", "copy"])
@layouts("plain", "ddp", "fsdp2-3", "hsdp", "tp")
def test_narrower_live_weights_are_served_by_a_copy(layout: str, replicas: str) -> None:
    """It is what a swap would put there, and the averages keep their precision."""
    model = wrap(layout, make_net(layout).bfloat16())
    ema = ShardedEMA(model, decay=0.5, replicas=replicas)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    ema.update()
    averages = ema.full_state_dict(dtype=torch.float32)
    split = replicas == "shard" and layout in ("ddp", "hsdp", "tp")
    assert ema.serves_by == (GATHERED if split else CAST)
    with ema.swapped():
        swapped = narrow_output(model)
    with ema.serving():
        assert torch.equal(narrow_output(model), swapped)
    assert_bitwise_equal(ema.full_state_dict(dtype=torch.float32), averages)


@torch.no_grad()
def narrow_output(model: nn.Module) -> Tensor:
    model.eval()
    return model(batch().bfloat16()).clone()


@pytest.mark.parametrize("replicas", ["shard", "copy"])
@layouts("plain", "ddp", "fsdp2-3", "hsdp", "tp")
def test_how_averages_are_served_is_said(layout: str, replicas: str) -> None:
    _, ema = trained(layout, replicas=replicas)
    split = replicas == "shard" and layout in ("ddp", "hsdp", "tp")
    assert ema.serves_by == (GATHERED if split else THEMSELVES)
    assert f"serves by {ema.serves_by})" in repr(ema)
