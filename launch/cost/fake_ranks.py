"""One rank's own time in every call, with many ranks that torch's fake process group stands for.

The process believes that it is the first of so many ranks. Collectives return at once and move nothing, and ranks do not
wait for each other. What is left is what the host of a rank does by itself: Python, and operators on its own tensors.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Literal, get_args
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore  # no public name

from ema_dist import ShardedEMA
from launch.benchmark.measure import Record

FakeLayout = Literal["ddp", "fsdp2", "hsdp", "tp", "fsdp2-tp", "fsdp1"]
LAYOUTS: tuple[FakeLayout, ...] = get_args(FakeLayout)
INNER = 8
"""Shards of a replica under HSDP, and tensor-parallel ranks beside FSDP2."""
WIDTH = 64
CALLS = (
    *("construct", "update", "swap in", "swap out", "serving in", "serving out", "state_dict", "load_state_dict"),
    *("gather", "load_full", "copy_to", "check_replicas", "attach"),
)


@dataclass(frozen=True)
class FakeCase:
    """A model of so many square matrices, as the first of so many ranks holds it."""

    layout: FakeLayout
    ranks: int
    tensors: int
    repeats: int


def measure_apart(case: FakeCase) -> Record:
    """The times of one case, measured in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (case,))


def _measure(case: FakeCase) -> Record:
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.ranks)
    samples: dict[str, list[float]] = {call: [] for call in CALLS}
    with _without_communication():
        model, other = _wrap(case), _wrap(case)
        for _ in range(case.repeats + 1):
            for call, seconds in _times(model, other).items():
                samples[call].append(seconds)
    # The first round does what is done once: kernels are selected, FSDP2 initializes itself.
    medians = {call: statistics.median(seconds[1:]) for call, seconds in samples.items()}
    return {**asdict(case), "seconds": medians}


def _times(model: nn.Module, other: nn.Module) -> Mapping[str, float]:
    """Seconds of each of `CALLS`, each made once."""
    times: dict[str, float] = {}

    def timed(call: str, run: Callable[[], object]) -> object:
        start = time.process_time()
        result = run()
        times[call] = time.process_time() - start
        return result

    def timed_block(call: str, block: AbstractContextManager[object]) -> None:
        timed(f"{call} in", block.__enter__)
        timed(f"{call} out", lambda: block.__exit__(None, None, None))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averages: list[ShardedEMA] = []
    timed("construct", lambda: averages.append(ShardedEMA(model)))
    ema = averages.pop()
    full = dict(ema.gather())
    timed("update", ema.update)
    timed_block("swap", ema.swapped())
    timed_block("serving", ema.serving())
    state = ema.state_dict()
    timed("state_dict", ema.state_dict)
    timed("load_state_dict", lambda: ema.load_state_dict(state))
    timed("gather", lambda: list(ema.gather()))
    timed("load_full", lambda: ema.load_full_state_dict(full))
    timed("copy_to", lambda: ema.copy_to(other))
    timed("check_replicas", ema.check_replicas)
    timed("attach", lambda: ema.attach(optimizer).remove())
    return times


@contextmanager
def _without_communication() -> Iterator[None]:
    """Ranks wait for nobody, and an all-gather moves nothing: the fake one fills its output rank by rank."""
    with ExitStack() as stack:
        for name in ("averages.live_model.rendezvous", "communication.replica_collectives.all_gather"):
            stack.enter_context(patch(f"ema_dist.{name}", lambda *_, **__: None))
        stack.enter_context(patch("ema_dist.sharding.gather_rows.all_gather", lambda *_, **__: None))
        yield


def _wrap(case: FakeCase) -> nn.Module:
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(case.tensors)))
    match case.layout:
        case "ddp":
            return DistributedDataParallel(net)
        case "fsdp1":
            return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
        case "tp":
            return _tensor_parallel(net, init_device_mesh("cpu", (case.ranks,)))
    outer, inner = ("data", "model") if case.layout == "fsdp2-tp" else ("replicate", "shard")
    if case.layout == "fsdp2":
        return fully_shard(net, mesh=init_device_mesh("cpu", (case.ranks,)))
    mesh = init_device_mesh("cpu", (case.ranks // INNER, INNER), mesh_dim_names=(outer, inner))
    if case.layout == "hsdp":
        return fully_shard(net, mesh=mesh)
    return fully_shard(_tensor_parallel(net, mesh[inner]), mesh=mesh[outer])


def _tensor_parallel(net: nn.Sequential, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(net, mesh, {name: ColwiseParallel() for name, _ in net.named_children()})
