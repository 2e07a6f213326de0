"""Copies tensors to the CPU with the wrapper that shards them, and tells which wrapper or subclass a tensor has."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard as Block  # FSDP1's own checkpoint format has no public name
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from ema_dist.sharding.mesh_shard import dtensor_local


def cpu_copy(tensor: Tensor, copy: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """A copy of this rank's part on the CPU, wrapped and sharded as ``tensor`` is.

    Args:
        copy: copies a plain tensor to the CPU; None for ``Tensor.to``.
    """
    copy = copy or _copy
    if not isinstance(tensor, ShardedTensor):
        if subclass_name(tensor) or tensor.layout is not torch.strided:
            return _copy(tensor)
        if isinstance(tensor, DTensor):
            return DTensor(copy(dtensor_local(tensor).detach()), tensor._spec, requires_grad=False)
        return copy(tensor.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates the type that FSDP1 saves
        blocks = [Block(copy(block.tensor.detach()), block.metadata) for block in tensor.local_shards()]
        # The public constructor is collective: it gathers the metadata of all ranks. The group has no public name.
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            blocks,
            tensor.metadata(),
            process_group=tensor._process_group,
            sharding_spec=tensor.sharding_spec(),
        )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is this rank's part of a tensor that is distributed over ranks."""
    return isinstance(tensor, (DTensor, ShardedTensor))


def subclass_name(tensor: Tensor) -> str:
    """The type of this rank's part of ``tensor`` if it is a tensor subclass (quantized, float8); else empty."""
    local = dtensor_local(tensor) if isinstance(tensor, DTensor) else tensor
    return "" if type(local) in (Tensor, Parameter, ShardedTensor) else type(local).__name__
