"""Tensors of torchao's own types are handed out as they are, or refused by name before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from ema_dist import ShardedEMA, checkpoint
from ema_dist.evaluation.serving import DIRECT
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING
from tests.support.quantized import Quantized

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING

# The first test here takes about five seconds: that is how long importing torchao takes.
X = torch.linspace(-1.0, 1.0, 4 * 64).reshape(4, 64)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_optimizers_with_quantized_moments_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    """Older checkpoints stay."""
    model = nn.Linear(64, 64)
    optimizer = getattr(pytest.importorskip("torchao.optim"), kind)(model.parameters())
    checkpoint.save({"model": model}, tmp_path, step=0, keep=1)
    model(X).square().mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"optim\.state\.weight\.exp_avg'.*OptimState"):
        checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=1, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000000"]


@pytest.mark.usefixtures("eager")
def test_moments_that_torchao_leaves_plain_resume_exactly(tmp_path: Path) -> None:
    """It quantizes moments of 4096 elements and more."""
    runs: list[Any] = []
    for _ in range(2):
        model = nn.Linear(64, 8)
        runs.append({"model": model, "optim": pytest.importorskip("torchao.optim").AdamW8bit(model.parameters())})
    for step in range(4):
        for run in runs if step > 1 else runs[:1]:
            run["optim"].zero_grad()
            run["model"](X + step).square().mean().backward()
            run["optim"].step()
        if step == 1:
            checkpoint.save(runs[0], tmp_path, step=1)
            checkpoint.load(runs[1], tmp_path)
    assert torch.equal(runs[0]["model"].weight, runs[1]["model"].weight)


def quantized(kind: str) -> nn.Module:
    """A frozen quantized layer before one that trains."""
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    quantization.quantize_(model, getattr(quantization, kind)(), filter_fn=lambda _, name: name == "0")
    model[0].requires_grad_(requires_grad=False)
    return model


def plain(value: Tensor) -> Tensor:
    return value if type(value) is Tensor else value.dequantize()


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_frozen_quantized_weights_are_handed_out_as_they_are(kind: str, tmp_path: Path) -> None:
    model, fresh = quantized(kind), quantized(kind)
    ema = ShardedEMA(model, decay=0.5)
    optimizer = AdamW(model.parameters(), lr=0.1)
    model(X).square().mean().backward()
    optimizer.step()
    ema.update()
    with ema.swapped():
        expected = model(X)
    full = ema.full_state_dict()
    assert type(full["0.weight"]) is type(model[0].weight.data)
    assert torch.equal(plain(full["0.weight"]), plain(model[0].weight.data))
    fresh.load_state_dict(full, strict=True)
    assert torch.equal(fresh(X), expected)
    with ema.serving():
        assert torch.equal(model(X), expected)
    assert ema.serving_mode == DIRECT

    checkpoint.save({"ema": ema}, tmp_path, step=0)
    other = ShardedEMA(quantized(kind), decay=0.5)
    checkpoint.load({"ema": other}, tmp_path)
    assert torch.equal(other.full_state_dict()["1.weight"], full["1.weight"])
    with pytest.raises(RuntimeError, match=rf"model\.0\.weight'.*{type(full['0.weight']).__name__}"):
        checkpoint.save({"model": model, "optim": optimizer, "ema": ema}, tmp_path, step=1)
    with pytest.raises(ValueError, match=r"0\.weight.*file_format"):
        checkpoint.gather(ema, tmp_path / "safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"step-0000000000"}


@pytest.mark.world_size(2)
def test_frozen_quantized_weights_beside_sharded_ones_are_handed_out(tmp_path: Path) -> None:
    """Takes more than five seconds: each rank imports torchao."""
    model = quantized("Int8WeightOnlyConfig")
    fully_shard(model, ignored_params={model[0].weight})  # which torchao cannot shard
    ema = ShardedEMA(model, decay=0.5)
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.add_(1.0)
    ema.update()
    with ema.swapped():
        expected = model(X)
    with ema.serving():
        assert torch.equal(model(X), expected)
    full = ema.full_state_dict()
    checkpoint.gather(ema, tmp_path / "weights", file_format="torch")
    other = ShardedEMA(model, decay=0.5)
    checkpoint.scatter(other, tmp_path / "weights")
    for name, value in other.full_state_dict().items():
        assert type(value) is type(full[name])
        assert torch.equal(plain(value), plain(full[name]))


def test_buffers_of_other_types_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("scale", Quantized(torch.ones(1, dtype=torch.int8)))
    with pytest.raises(RuntimeError, match=r"model\.scale'.*Quantized"):
        checkpoint.save({"model": model}, tmp_path, step=1)
    assert not [*tmp_path.iterdir()]
