"""Measures the host time of every call on one rank of many; torch's fake process group stands in for the others.

The process runs as rank 0. Collectives return at once and transfer nothing, and ranks do not wait for each other. What
remains is the work of a rank's own host: Python, and operators on local tensors. The time is CPU time, so that other
processes matter less, and excludes garbage collection.
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import forkserver, get_context
from typing import Literal, get_args
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore  # no public name

from ema_dist import ShardedEMA
from launch.benchmark.cases import SmallTensors
from launch.benchmark.measure import Record

FakeLayout = Literal["ddp", "fsdp2", "hsdp", "tp", "fsdp2-tp", "fsdp1"]
LAYOUTS: tuple[FakeLayout, ...] = get_args(FakeLayout)
INNER_RANKS = 8
"""Shards of a replica under HSDP, and tensor-parallel ranks beside FSDP2."""
ALL_GATHERS = (
    "communication.replica_collectives.all_gather",
    "communication.row_exchange.all_gather",
    "sharding.gather_rows.all_gather",
)


@dataclass(frozen=True)
class FakeCase:
    """A model of small matrices, as the first of `ranks` ranks holds it."""

    layout: FakeLayout
    ranks: int
    tensors: int = 300
    repeats: int = 5

    @property
    def shape(self) -> SmallTensors:
        return SmallTensors(self.tensors)


def measure_in_subprocess(case: FakeCase) -> Record:
    """Median seconds of each call, measured in a process of its own."""
    forkserver.set_forkserver_preload([__name__])
    # Python 3.11 does not pass `sys.path` to the server, which silently skips modules that it cannot find.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    with get_context("forkserver").Pool(1) as pool:
        return pool.apply(_measure, (case,))


def _measure(case: FakeCase) -> Record:
    torch.set_num_threads(1)
    with fake_ranks(case.ranks):
        model, other = build(case), build(case)
        gc.collect()
        gc.freeze()
        # The first round includes one-time work: the selection of kernels, and FSDP2's initialization.
        rounds = [_times(model, other) for _ in range(case.repeats + 1)][1:]
    seconds = {call: statistics.median(times[call] for times in rounds) for call in rounds[0]}
    return {"case": asdict(case), "seconds": seconds}


def _times(model: nn.Module, other: nn.Module) -> Mapping[str, float]:
    """Seconds of each call, made once."""
    times: dict[str, float] = {}

    def timed(call: str, run: Callable[[], object]) -> None:
        gc.collect()
        gc.disable()  # as timeit does: a collection takes longer than a call, and may happen during any call
        start = time.process_time()
        run()
        times[call] = time.process_time() - start
        gc.enable()

    def timed_block(call: str, block: AbstractContextManager[object]) -> None:
        timed(f"{call}, in", block.__enter__)
        timed(f"{call}, out", lambda: block.__exit__(None, None, None))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made: list[ShardedEMA] = []
    timed("ShardedEMA(model)", lambda: made.append(ShardedEMA(model)))
    ema = made.pop()
    timed("update()", ema.update)
    timed_block("swapped()", ema.swapped())
    timed_block("serving()", ema.serving())
    state, full = ema.state_dict(), dict(ema.gather())
    timed("state_dict()", ema.state_dict)
    timed("load_state_dict()", lambda: ema.load_state_dict(state))
    timed("gather()", lambda: list(ema.gather()))
    timed("load_full_state_dict()", lambda: ema.load_full_state_dict(full))
    timed("copy_to()", lambda: ema.copy_to(other))
    timed("check_replicas()", ema.check_replicas)
    timed("attach()", lambda: ema.attach(optimizer).remove())
    return times


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """Inside the block, this process is the first of many ranks, which neither communicate nor wait."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with ExitStack() as stack:
            stack.enter_context(patch("ema_dist.averages.live_model.rendezvous"))
            for name in ALL_GATHERS:
                stack.enter_context(patch(f"ema_dist.{name}", _issue_only))
            yield
    finally:
        dist.destroy_process_group()


def _issue_only(_gathered: Tensor, part: Tensor, *, group: ProcessGroup) -> None:
    """Replaces an all-gather by another collective: the fake all-gather takes milliseconds to fill its result."""
    dist.all_reduce(part, group=group)


def build(case: FakeCase) -> nn.Module:
    net = case.shape.build()
    if case.layout == "ddp":
        return DistributedDataParallel(net)
    if case.layout == "fsdp1":
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    if case.layout in ("fsdp2", "tp"):
        mesh = init_device_mesh("cpu", (case.ranks,))
        (fully_shard if case.layout == "fsdp2" else _tensor_parallel)(net, mesh=mesh)
        return net
    mesh = init_device_mesh("cpu", (case.ranks // INNER_RANKS, INNER_RANKS), mesh_dim_names=("outer", "inner"))
    if case.layout == "fsdp2-tp":
        _tensor_parallel(net, mesh=mesh["inner"])
    fully_shard(net, mesh=mesh if case.layout == "hsdp" else mesh["outer"])
    return net


def _tensor_parallel(net: nn.Sequential, *, mesh: DeviceMesh) -> None:
    parallelize_module(net, mesh, {name: ColwiseParallel() for name, _ in net.named_children()})
