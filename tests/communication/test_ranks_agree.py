"""Ranks go on together or not at all, and each of them gets to know why."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ema_dist import ShardedEMA
from tests.support.layouts import assert_bitwise_equal, evaluate, full_weights, layouts, make_net, make_trained, wrap


@layouts("ddp", "ddp-3", "hsdp")
def test_replica_drift_is_reported_on_all_ranks(layout: str) -> None:
    """Also to those whose own replicas agree: they would go on alone, and hang."""
    model, ema = make_trained(layout, timeout=5.0)
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        dict(model.named_parameters())[next(n for n, p in model.named_parameters() if "out.weight" in n)].data.mul_(2)
    with pytest.raises(RuntimeError, match=rf"out\.weight.*\[{last}\]"), ema.swapped():
        pass
    with pytest.raises(RuntimeError, match=rf"out\.weight.*\[{last}\]"):
        ShardedEMA(model, timeout=5.0)
    assert ema.full_state_dict() or dist.get_rank() > 0


@layouts("ddp", "fsdp2-3")
def test_an_error_on_one_rank_is_raised_on_all(layout: str) -> None:
    model, ema = make_trained(layout, timeout=5.0)
    if dist.get_rank() == 1:
        for parameter in model.parameters():
            parameter.requires_grad_()
    expected = (
        (ValueError, r"^(?!.*rank 1).*frozen\.weight.*trainable")
        if dist.get_rank() == 1
        else (RuntimeError, r"rank 1.*frozen\.weight.*trainable")
    )
    with pytest.raises(expected[0], match=expected[1]):
        ema.full_state_dict()


@layouts("ddp", "hsdp")
def test_a_swap_not_left_by_all_ranks_can_be_restored(layout: str) -> None:
    model, ema = make_trained(layout, timeout=0.5)
    live = full_weights(model)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"0\.5 s.*swapped\(\).*restore\(\)"), ema.swapped() as inside:
            pass
    else:
        with pytest.raises(RuntimeError, match=r"0\.5 s.*swapped\(\).*restore\(\)"), ema.swapped() as inside:
            time.sleep(1.5)
    assert inside is model
    dist.barrier()
    with pytest.raises(RuntimeError, match=r"already.*restore\(\)"), ema.swapped():
        pass
    ema.restore()
    ema.restore()
    assert_bitwise_equal(full_weights(model), live)
    with ema.swapped():
        pass


@pytest.mark.world_size(3)
def test_a_new_process_group_resets_the_rendezvous(tmp_path: Path) -> None:
    """Its ranks may have met elsewhere under other numbers."""
    net = make_net("ddp")
    if dist.get_rank() < 2:
        group = dist.new_group([0, 1], use_local_synchronization=True)
        ShardedEMA(DistributedDataParallel(net, process_group=group))
    dist.barrier()
    dist.destroy_process_group()
    rank = int(os.environ["RANK"]) - 1
    if rank >= 0:
        store = dist.FileStore(str(tmp_path / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
        ema = ShardedEMA(DistributedDataParallel(make_net("ddp")), timeout=10.0)
        with ema.swapped():
            pass
        dist.barrier()
        dist.destroy_process_group()


@pytest.mark.world_size(2)
def test_a_gather_cannot_continue_inside_a_swap() -> None:
    """What lies where changes under it."""
    _, ema = make_trained("ddp")
    entries = ema.gather()
    next(entries)
    with ema.swapped(), pytest.raises(RuntimeError, match=r"swapped\(\).*gather\(\)"):
        next(entries)


@pytest.mark.world_size(4)
def test_tensor_parallel_parameters_inside_fsdp1_are_refused() -> None:
    """The flat parameter holds one block of each, and its full tensor would be that block."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    net = parallelize_module(nn.Sequential(nn.Linear(4, 8)), mesh["model"], {"0": ColwiseParallel()})
    model = FullyShardedDataParallel(net, device_id=torch.device("cpu"), device_mesh=mesh["data"])
    with pytest.raises(ValueError, match=r"FSDP1.*tensor.parallel.*fully_shard"):
        ShardedEMA(model)


@layouts("fsdp1", "fsdp1-flat")
def test_calls_inside_summon_full_params_are_refused(layout: str) -> None:
    model, ema = make_trained(layout)
    with FullyShardedDataParallel.summon_full_params(model), pytest.raises(ValueError, match="summon_full_params"):
        ema.state_dict()
    assert ema.full_state_dict() or dist.get_rank() > 0


@pytest.mark.world_size(4)
def test_a_pipeline_group_within_one_stage_is_refused() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = FullyShardedDataParallel(
        nn.Linear(4, 4),
        device_id=torch.device("cpu"),
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
    )
    with pytest.raises(ValueError, match=r"pipeline=\[\d, \d\].*\[0, 1, 2, 3\]"):
        ShardedEMA(model).full_state_dict(pipeline=mesh.get_group("replicate"))


@layouts("fsdp1", "fsdp1-flat", "fsdp2", "fsdp2-3", "hsdp", "tp")
def test_the_first_forward_may_happen_inside_a_swap(layout: str) -> None:
    """FSDP sets itself up in it."""
    model = wrap(layout, make_net(layout))
    ema = ShardedEMA(model)
    with ema.swapped():
        inside = evaluate(model)
    assert torch.equal(evaluate(model), inside)
