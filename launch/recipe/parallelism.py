"""Every way `train.py` can spread its model over ranks: each takes a whole model and returns it wrapped."""

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

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # checkpoints are planned through gloo on either


@contextmanager
def process_group(device_type: str) -> Iterator[torch.device]:
    """This rank's device, inside torchrun's process group; a process that torchrun did not start is a group of one."""
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        store, rank, ranks = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {_restart_count()}", store)
        dist.init_process_group(BACKENDS[device_type], store=store, rank=rank, world_size=ranks)
    else:
        dist.init_process_group(BACKENDS[device_type], store=dist.HashStore(), rank=0, world_size=1)
    yield device
    # Only on success: a rank that failed must not wait here for its peers, torchrun ends them.
    dist.barrier()
    if device.type == "cuda":  # gloo's threads may keep torch 2.7 waiting forever, and the process ends anyway
        dist.destroy_process_group()


def _restart_count() -> str:
    """How many times torchrun has restarted the ranks.

    torch 2.13 gives ranks that were restarted the store of those before them, with the addresses of those in it. On
    several nodes the agents count differently; there the environment of slurm.sbatch makes torchrun start a new store.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else "0"


def wrap(model: VisionTransformer, parallel: str, device: torch.device) -> nn.Module:
    """`model` on `device` in the layout that `--parallel` names."""
    return WRAPPERS[parallel](model.to(device))


def data_rank_and_size(parallel: str) -> tuple[int, int]:
    """Which part of each batch this rank takes, of how many; tensor parallelism feeds every rank the same."""
    if parallel == "tp":
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def default_parallel() -> str:
    """DDP under torchrun with several ranks, else no wrapper at all."""
    return "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "plain"


def _plain(model: VisionTransformer) -> nn.Module:
    if dist.get_world_size() > 1:
        raise ValueError(f"--parallel plain trains on one process, not on {dist.get_world_size()}: pass --parallel ddp")
    return model


def _ddp(model: VisionTransformer) -> nn.Module:
    wrapped = DistributedDataParallel(model)
    # DDP arranges its buckets, and with them the order in which gradients are added, anew after the first backward. In
    # a resumed run that would be at another step than in one that never stopped.
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
    """Sharded inside each node and replicated over nodes; a single node is split in two."""
    ranks = dist.get_world_size()
    replicas = max(2, ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    if ranks < 4 or ranks % replicas:
        raise ValueError(f"--parallel hsdp needs 4, 6, 8, ... ranks, not {ranks}: pass --parallel fsdp2")
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
        raise ValueError(f"--parallel tp shares {model.heads} attention heads out evenly, not over {ranks} ranks")
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
