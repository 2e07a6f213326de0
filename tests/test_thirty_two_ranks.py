"""Every call once on 32 real ranks: eight times as many as elsewhere, and more than some tensors have rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ema_dist import ShardedEMA, checkpoint
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal, full_weights

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


RANKS = 32
DECAY = 0.75


def _net(seed: int) -> nn.Sequential:
    """Rows for all ranks, for some of them and for one."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 70), nn.BatchNorm1d(70), nn.Linear(70, 11), nn.Linear(11, 1))


def _hsdp(seed: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS // 4, 4), mesh_dim_names=("replicate", "shard"))
    return fully_shard(_net(seed), mesh=mesh)


def _ddp(seed: int) -> nn.Module:
    return DistributedDataParallel(_net(seed))


@torch.no_grad()
def _evaluate(model: nn.Module) -> Tensor:
    return model.eval()(torch.ones(3, 6)).clone()


def _use(model: nn.Module) -> tuple[ShardedEMA, dict[str, Tensor]]:
    """Averages after one update, on which everything but saving was tried; and their values by hand."""
    ema = ShardedEMA(model, decay=DECAY, timeout=120.0)
    first = full_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    ema.update()
    live = full_weights(model)
    expected = {name: DECAY * first[name] + (1 - DECAY) * value for name, value in live.items()}
    with ema.swapped():
        averages, swapped = full_weights(model), _evaluate(model)
    assert_bitwise_equal(full_weights(model), live)
    for name, value in averages.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    with ema.serving():
        assert torch.equal(_evaluate(model), swapped)
    ema.check_replicas()
    return ema, averages


@pytest.mark.slow  # 32 processes share two cores
@pytest.mark.world_size(RANKS, timeout=240)
def test_every_call_on_32_ranks(tmp_path: Path) -> None:
    """A checkpoint of HSDP continues there, and in DDP."""
    model = _hsdp(seed=0)
    ema, averages = _use(model)
    checkpoint.save({"model": model, "ema": ema}, tmp_path, step=1)
    for other in (_hsdp(seed=1), _ddp(seed=2)):
        other_ema, _ = _use(other)
        checkpoint.load({"model": other, "ema": other_ema}, tmp_path)
        with other_ema.swapped():
            assert_bitwise_equal(full_weights(other), averages)
        assert_bitwise_equal(full_weights(other), full_weights(model))
    full = other_ema.full_state_dict()
    if dist.get_rank() == 0:
        assert_bitwise_equal(full, averages)
    other_ema.load_full_state_dict({name: value + 1 for name, value in full.items()})
    other_ema.copy_to(other)
    assert_bitwise_equal(full_weights(other), {name: (value.float() + 1).double() for name, value in averages.items()})
