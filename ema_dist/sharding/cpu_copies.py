"""Copies that later writes to a tensor do not reach."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard as Block  # FSDP1's own checkpoint format has no public name
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor


def cpu_copy(tensor: Tensor) -> Tensor:
    """A copy of this rank's part, in the memory of the CPU, dressed and cut as ``tensor`` is."""
    if not isinstance(tensor, ShardedTensor):
        return tensor.detach().to("cpu", copy=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates what FSDP1 saves as
        blocks = [Block(block.tensor.to("cpu", copy=True), block.metadata) for block in tensor.local_shards()]
        return (
            ShardedTensor._init_from_local_shards_and_global_metadata(  # the public form gathers what each rank knows
                blocks,
                tensor.metadata(),
                process_group=tensor._process_group,
                sharding_spec=tensor.sharding_spec(),
            )
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` stands for one of which other ranks hold other parts."""
    return isinstance(tensor, (DTensor, ShardedTensor))
