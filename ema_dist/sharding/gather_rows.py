"""Gathers a tensor whose rows are split over ranks, in few collectives on any number of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.sharding.compat import all_gather
from ema_dist.sharding.rank_sets import group_ranks

MAX_BROADCAST_RANKS = 8
"""Up to this many ranks, CPU chunks are broadcast in turn: gloo, unlike NCCL, needs a second copy for an all-gather."""

MAX_PADDING_BYTES = 2**20
"""The maximum padding in the buffer of an all-gather, for last chunks that are short or empty."""

MIN_BROADCAST_BYTES = 2**20
"""From this size on, sending a chunk takes longer than starting a broadcast, so one collective per chunk is fast."""


def gather_dim(local: Tensor, dim: int, length: int, group: ProcessGroup) -> Tensor:
    """Gather ``length`` slices along ``dim``; each rank of ``group`` holds the chunk that ``torch.chunk`` would make.

    Small chunks with much padding, such as few rows over many ranks, are merged by an all-reduce: it sends each byte
    twice, in one collective.

    Collective: over ``group``; the number of collectives depends on bytes, not on ranks.
    Memory: one tensor of the result's size for the first dimension, two for others.
    """
    local = local.movedim(dim, 0).contiguous()
    shape = local.shape[1:]
    chunk_size = max(1, -(-length // group.size()))
    row_bytes = shape.numel() * local.element_size()
    padded = chunk_size * group.size()
    max_broadcast_length = chunk_size * (MAX_BROADCAST_RANKS if local.device.type == "cpu" else 1)
    if length > max_broadcast_length and (padded - length) * row_bytes <= MAX_PADDING_BYTES:
        gathered = local.new_empty((padded, *shape))
        padded_local = local
        if len(local) < chunk_size:
            padded_local = local.new_empty((chunk_size, *shape))
            padded_local[: len(local)] = local
        all_gather(as_bytes(gathered), as_bytes(padded_local), group=group)
    elif length <= max_broadcast_length or chunk_size * row_bytes >= MIN_BROADCAST_BYTES:
        gathered = local.new_empty((length, *shape))
        ranks = group_ranks(group).ranks
        for index, rows in enumerate(gathered.split(chunk_size)):
            if index == group.rank():
                rows.copy_(local)
            dist.broadcast(as_bytes(rows), ranks[index], group=group)
    else:
        gathered = local.new_zeros((length, *shape))
        start = min(group.rank() * chunk_size, length)
        gathered[start : start + len(local)] = local
        merge_bytes(as_bytes(gathered), group)
    return gathered[:length].movedim(0, dim)


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as its bytes: NCCL and gloo lack some dtypes, among them int16, uint16 and uint32."""
    return tensor.view(-1).view(torch.uint8)


def merge_bytes(buffer: Tensor, group: ProcessGroup) -> None:
    """Give every rank the bytes of all ranks; each byte must be zero on all ranks but one.

    Collective: over ``group``, one all-reduce. Shape: ``buffer`` is contiguous uint8.
    """
    # A sum, because NCCL has no bitwise operations. Wider integers are added faster, and no byte carries into the next.
    is_aligned = buffer.numel() % 4 == 0 and buffer.storage_offset() % 4 == 0
    dist.all_reduce(buffer.view(torch.int32) if is_aligned else buffer, group=group)
