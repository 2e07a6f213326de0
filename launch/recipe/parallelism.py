"""The process group, and the wrappers that `--parallel` chooses from: each takes the plain model and wraps it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from .model import Block, VisionTransformer
from .preemption import Preempted
from .script import OptionParser, UsageError

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # checkpoint plans are exchanged over gloo on both


@contextmanager
def process_group(device_type: str) -> Iterator[torch.device]:
    """Enters torchrun's process group and yields this rank's device; without torchrun, a group of one process."""
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device_type)
    if device_type == "cuda":
        require_gpu()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {_restart_count()}", store)
        dist.init_process_group(BACKENDS[device_type], store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(BACKENDS[device_type], store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
    except Preempted:
        _leave_process_group(device)
        raise
    _leave_process_group(device)  # not after an error: a rank that failed must not wait for its peers


def require_gpu() -> None:
    """Raise a UsageError, on all ranks of this machine, if it has fewer GPUs than ranks."""
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > gpus:
        fewer_ranks = f" or --nproc-per-node {gpus}" if gpus else ""
        raise UsageError(
            f"each rank needs a GPU of its own; ranks on this machine: {ranks}, GPUs: {gpus}; "
            f"pass --device cpu{fewer_ranks}"
        )


def _leave_process_group(device: torch.device) -> None:
    dist.barrier()
    if device.type == "cuda":  # on a CPU, destroying a gloo group may wait forever (torch 2.7)
        dist.destroy_process_group()


def _restart_count() -> str:
    """How many times torchrun has restarted the ranks; always 0 on several nodes.

    torch 2.13 gives restarted ranks the store of the previous ones, which still holds their addresses. On several nodes
    the agents' counts may differ; there, a variable in slurm.sbatch makes torchrun start a new store.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else "0"


def wrap(model: VisionTransformer, parallel: str, device: torch.device) -> nn.Module:
    """Moves `model` to `device` and wraps it as `--parallel` says."""
    return WRAPPERS[parallel](model.to(device))


def describe_run(parallel: str, device: str, model: nn.Module, law: object) -> str:
    """The line that a script prints before it trains; `model` is not wrapped yet, and `law` is its averaging law."""
    ranks, parameters = dist.get_world_size(), sum(parameter.numel() for parameter in model.parameters())
    layout = f"layout {parallel}, {ranks} rank{'s' * (ranks > 1)}, device {device}"
    return f"{layout}; {parameters:,} parameters; EMA schedule {law}"


def data_rank_and_size(parallel: str) -> tuple[int, int]:
    """The index of this rank's part of a batch, and the number of parts; under TP, every rank gets the full batch."""
    if parallel == "tp":
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def add_layout_options(parser: OptionParser) -> None:
    """Add the options of `process_group` and `wrap`. The default is DDP under torchrun with several ranks."""
    parser.option(
        "--parallel",
        "how the model is distributed; by default ddp on several ranks, plain on one",
        choices=WRAPPERS,
        default="ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "plain",
    )
    parser.option("--device", "auto takes a GPU if there is one", choices=["auto", "cpu", "cuda"], default="auto")


def _plain(model: VisionTransformer) -> nn.Module:
    if dist.get_world_size() > 1:
        raise UsageError(f"--parallel plain trains on one process, not on {dist.get_world_size()}: pass --parallel ddp")
    return model


def _ddp(model: VisionTransformer) -> nn.Module:
    wrapped = DistributedDataParallel(model)
    # DDP rebuilds its buckets after the first backward, which changes the order in which gradients are summed. Without
    # this backward, a resumed run would rebuild them at another step than an uninterrupted run.
    wrapped(torch.zeros(1, 1, 8, 8, device=model.position.device)).sum().backward()
    wrapped.zero_grad()
    return wrapped


def _fsdp1(model: VisionTransformer) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=True,
        device_id=model.position.device,
        device_mesh=_mesh(model, shard=dist.get_world_size()),
    )


def _fsdp2(model: VisionTransformer) -> nn.Module:
    return _fully_shard(model, _mesh(model, shard=dist.get_world_size()))


def _hsdp(model: VisionTransformer) -> nn.Module:
    """Sharded within each node and replicated across nodes; a single node is split into two replicas."""
    ranks = dist.get_world_size()
    replicas = max(2, ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    if ranks < 4 or ranks % replicas:
        raise UsageError(f"--parallel hsdp needs 4, 6, 8, ... ranks, not {ranks}: pass --parallel fsdp2")
    return _fully_shard(model, _mesh(model, replicate=replicas, shard=ranks // replicas))


def _mesh(model: VisionTransformer, **sizes: int) -> DeviceMesh:
    return init_device_mesh(model.position.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _fully_shard(model: VisionTransformer, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _tp(model: VisionTransformer) -> nn.Module:
    ranks = dist.get_world_size()
    if model.heads % ranks:
        raise UsageError(f"--parallel tp shares {model.heads} attention heads out evenly, not over {ranks} ranks")
    plan: dict[str, ParallelStyle] = {
        "blocks.*.attention.query": ColwiseParallel(),
        "blocks.*.attention.key": ColwiseParallel(),
        "blocks.*.attention.value": ColwiseParallel(),
        "blocks.*.attention.out": RowwiseParallel(),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(),
    }
    return parallelize_module(model, _mesh(model, tensor=ranks), plan)


WRAPPERS: dict[str, Callable[[VisionTransformer], nn.Module]] = {
    "plain": _plain,
    "ddp": _ddp,
    "fsdp1": _fsdp1,
    "fsdp2": _fsdp2,
    "hsdp": _hsdp,
    "tp": _tp,
}
