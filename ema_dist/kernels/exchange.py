"""Exchanges the contents of two lists of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ema_dist.kernels.lists import chunks
from ema_dist.kernels.scratch import make_scratch, scratch_views


@torch.no_grad()
def exchange_(lists: list[tuple[list[Tensor], list[Tensor]]]) -> None:
    """Exchange the contents of each pair of tensors, bit for bit; ``lists`` are as `group_pairs` makes them.

    Memory: one scratch of at most `CPU_SCRATCH_BYTES` or `DEVICE_SCRATCH_BYTES` per device.
    """
    # All scratches are allocated before the first list is touched: an out-of-memory error then leaves all as it was.
    scratches: dict[torch.device, Tensor] = {}
    for left, _ in lists:
        scratch = make_scratch(left).view(torch.uint8)
        if scratch.nbytes > scratches.get(scratch.device, scratch[:0]).nbytes:
            scratches[scratch.device] = scratch
    for left, right in lists:
        size = left[0].element_size()
        buffer = scratches.get(left[0].device, left[0].new_empty(0).view(torch.uint8))
        scratch = buffer[: buffer.nbytes // size * size].view(left[0].dtype)
        for ours, theirs in chunks(left, right, max_bytes=scratch.nbytes):
            saved = scratch_views(scratch, ours)
            torch._foreach_copy_(saved, ours)
            torch._foreach_copy_(ours, theirs)
            torch._foreach_copy_(theirs, saved)
