"""Ranks go on together or not at all, and each of them gets to know why."""

from __future__ import annotations

import os
import re
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ema_dist import HalfLife, Offloaded, ShardedEMA, Stochastic, checkpoint
from ema_dist.communication.rendezvous import RendezvousError, announce_failure
from ema_dist.sharding import ReplicaPolicy
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    assert_bitwise_equal,
    evaluate,
    full_weights,
    layouts,
    make_net,
    make_trained,
    wrap,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


@layouts("ddp", "ddp-3", "hsdp")
def test_replica_drift_is_reported_on_all_ranks(layout: str) -> None:
    """Also to those whose own replicas agree: they would go on alone, and hang."""
    model, ema = make_trained(layout, timeout=5.0)
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        dict(model.named_parameters())[next(n for n, p in model.named_parameters() if "out.weight" in n)].data.mul_(2)
    with pytest.raises(RuntimeError, match=rf"out\.weight on rank {last}\b"), ema.swapped():
        pass
    with pytest.raises(RuntimeError, match=rf"out\.weight on rank {last}\b"):
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
@pytest.mark.parametrize("replicas", ["shard", "copy"])
def test_a_time_that_differs_between_ranks_is_reported_before_weights_are_written(
    replicas: ReplicaPolicy, tmp_path: Path
) -> None:
    ema = ShardedEMA(DistributedDataParallel(nn.Linear(2, 2)), replicas=replicas, timeout=5.0)
    ema.update(elapsed=1 + dist.get_rank())
    with pytest.raises(RendezvousError, match=r"rank 0 has time=1\.0, rank 1 has time=2\.0|digest of all calls"):
        checkpoint.gather(ema, tmp_path)


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
    with pytest.raises(ValueError, match=r"pipeline\b.*ranks \d, \d .*ranks 0-3$"):
        ShardedEMA(model).full_state_dict(pipeline=mesh.get_group("replicate"))


@layouts("fsdp1", "fsdp1-flat", "fsdp2", "fsdp2-3", "hsdp", "tp")
def test_the_first_forward_may_happen_inside_a_swap(layout: str) -> None:
    """FSDP sets itself up in it."""
    model = wrap(layout, make_net(layout))
    ema = ShardedEMA(model)
    with ema.swapped():
        inside = evaluate(model)
    assert torch.equal(evaluate(model), inside)


def _fails_with(*words: str) -> AbstractContextManager[pytest.ExceptionInfo[RendezvousError]]:
    """All ranks raise the error, and it contains the words in this order."""
    return pytest.raises(RendezvousError, match=".*".join(map(re.escape, words)), check=lambda error: error.same_call)


@pytest.mark.world_size(2)
def test_ranks_that_differ_are_told_what_differs() -> None:
    """Ranks that name other tracks, have made other calls, or construct with other settings, under DDP."""
    rank = dist.get_rank()
    model = DistributedDataParallel(make_net("ddp"))
    two = ShardedEMA(model, decay={"a": HalfLife(0), "b": 0.9}, timeout=10.0)
    track = "ab"[rank]
    with pytest.raises(RendezvousError, match=r"rank 0 made swapped\('a'\), rank 1 made swapped\('b'\)") as caught:
        two.swapped(track).__enter__()
    assert not caught.value.same_call
    with pytest.raises(
        RendezvousError, match=r"rank 0 made full_state_dict\('a'\), rank 1 made full_state_dict\('b'\)"
    ):
        two.full_state_dict(track=track)
    with pytest.raises(RendezvousError, match=r"rank 0 made .*float16\), rank 1 made .*float32\)"):
        two.full_state_dict(track="a", dtype=(torch.float16, torch.float32)[rank])
    ema = ShardedEMA(model, decay=0.5, timeout=10.0)
    for _ in range(3 - rank):
        ema.update()
    with _fails_with("rank 0 has called update() 3 times, rank 1 has called update() twice"), ema.swapped():
        pass
    for call in (ema.state_dict, ema.full_state_dict, lambda: checkpoint.save({"ema": ema}, "nowhere", step=0)):
        with _fails_with("rank 0 has called update() 3 times"):
            call()
    ema.load_state_dict(ema.state_dict(for_loading=True) | {"steps": 7, "updates": 7})
    ema.state_dict()
    ema.load_state_dict(ema.state_dict() | {"steps": rank})
    with _fails_with("rank 0 has steps=0"):
        ema.state_dict()
    settings: dict[str, tuple[Any, Any]] = {
        "decay": (HalfLife(10), HalfLife(11)),
        "start": (0, 1),
        "update_interval": (1, 2),
        "dtype": (None, torch.float64),
        "rounding": (Stochastic(0), Stochastic(1)),
        "replicas": ("shard", "copy"),
        "buffers": ("average", "copy"),
        "kernel": ("foreach", "scratch"),
        "store": (None, Offloaded()),
        "timeout": (10.0, 11.0),
    }
    for name, values in settings.items():
        with _fails_with(f"rank 0 has {name}=", f"rank 1 has {name}="):
            ShardedEMA(model, **{"timeout": 10.0, name: values[rank]})
    with _fails_with("rank 0", "decay['a']=", "rank 1"):
        ShardedEMA(model, decay=[{"a": 0.5, "b": 0.5}, {"b": 0.5}][rank])


@pytest.mark.world_size(2)
def test_ranks_that_count_other_times_are_told() -> None:
    rank = dist.get_rank()
    _, ema = make_trained("fsdp2", timeout=10.0)
    ema.update(elapsed=100 + rank)
    with _fails_with("rank 0", "update(100", "rank 1", "update(101"):
        ema.full_state_dict()
    with _fails_with("rank 0", "time=103", "rank 1", "time=104"):
        ema.state_dict()
    ema.reset()
    ema.state_dict()


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "setting",
    [{"replicas": "?"}, {"decay": 2.0}, {"dtype": torch.int32}, {"buffers": "?"}, {"store": "?"}],
    ids=lambda setting: next(iter(setting)),
)
def test_a_wrong_setting_on_one_rank_is_reported_on_all(setting: dict[str, Any]) -> None:
    model = DistributedDataParallel(make_net("ddp"))
    is_wrong = dist.get_rank() == 0
    with pytest.raises(ValueError) if is_wrong else _fails_with("rank 0", str(*setting.values())):  # noqa: PT011
        ShardedEMA(model, timeout=10.0, **(setting if is_wrong else {}))


@pytest.mark.world_size(3)
def test_ranks_that_select_other_parameters_are_told_one() -> None:
    model = DistributedDataParallel(make_net("ddp"))
    only_one = "blocks.1.out.weight"
    with _fails_with("ranks 0, 2", "blocks.1.out.weight", "rank 1"):
        ShardedEMA(model, select=lambda name, _: dist.get_rank() != 1 or name != only_one)
    own_error = pytest.raises(ValueError, match="nothing to average")
    with own_error if dist.get_rank() == 2 else _fails_with("rank 2", "nothing to average"):
        ShardedEMA(model, select=lambda *_: dist.get_rank() != 2)
    own_error = pytest.raises(ZeroDivisionError)
    with own_error if dist.get_rank() == 2 else _fails_with("rank 2", "zero"):
        ShardedEMA(model, select=lambda *_: bool(1 / (2 - dist.get_rank())))
    if dist.get_rank() == 0:
        with pytest.raises(RendezvousError, match=r"ranks 1-2 did not arrive.*unwrapped module") as caught:
            ShardedEMA(model, replicas="copy", timeout=0.3)
        assert not caught.value.same_call
        ShardedEMA(model.module).update()


@pytest.mark.world_size(2)
def test_a_local_call_on_one_rank_is_told_at_the_next_rendezvous(tmp_path: Path) -> None:
    """Loading a checkpoint on all ranks makes them agree again."""
    _, ema = make_trained("fsdp2", timeout=10.0)
    checkpoint.save({"ema": ema}, tmp_path, step=0)
    if dist.get_rank() == 1:
        ema.update()
        with ema.serving():
            pass
    with _fails_with("rank 1", "serving()", "once", "rank 0"):
        ema.full_state_dict()
    with _fails_with("rank 1", "serving()", "once", "'ema'", "rank 0"):
        checkpoint.save({"ema": ema}, tmp_path, step=1)
    checkpoint.load({"ema": ema}, tmp_path)
    if dist.get_rank() == 1:
        ema.update()
    with ema.swapped():
        pass
    if dist.get_rank() == 0:
        ema.update()
    with _fails_with("rank 0 has called", "swapped(), update() last", "rank 1 has called", "update(), swapped() last"):
        ema.state_dict()


@pytest.mark.world_size(2)
def test_steps_that_were_skipped_on_one_rank_are_told_when_they_are_read() -> None:
    """A gradient scaler's ``found_inf`` must be the same everywhere."""
    _, ema = make_trained("fsdp2", timeout=10.0)
    ema.update(found_inf=torch.tensor(float(dist.get_rank())))
    assert ema.full_state_dict() or dist.get_rank() > 0
    with _fails_with("rank 0 has steps=", "rank 1 has steps="):
        ema.state_dict()


@pytest.mark.world_size(2)
def test_one_rank_may_evaluate_alone_where_each_has_all_averages(tmp_path: Path) -> None:
    model = DistributedDataParallel(make_net("ddp"))
    ema = ShardedEMA(model, replicas="copy", timeout=10.0)
    if dist.get_rank() == 0:
        with ema.swapped():
            pass
        with ema.serving():
            pass
    ema.update()
    checkpoint.save({"ema": ema}, tmp_path, step=0)
    ema.load_full_state_dict(ema.full_state_dict())


@pytest.mark.world_size(2)
def test_an_announced_failure_is_the_next_rendezvous_of_the_others() -> None:
    _, ema = make_trained("ddp", timeout=10.0)
    if dist.get_rank() == 1:
        announce_failure([0, 1], "rank 1 lost its weights")
    else:
        with pytest.raises(RendezvousError, match="rank 1 lost its weights") as caught:
            ema.full_state_dict()
        assert not caught.value.same_call
        with pytest.raises(RuntimeError, match="rank 1 lost its weights"):
            ema.state_dict()
