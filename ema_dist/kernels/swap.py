"""Two lists of tensors change places."""

from __future__ import annotations

import torch
from torch import Tensor

from ema_dist.kernels.lists import chunks
from ema_dist.kernels.scratch import make_scratch, scratch_views


@torch.no_grad()
def swap_(lists: list[tuple[list[Tensor], list[Tensor]]]) -> None:
    """Let the contents of each pair change places, to the bit; ``lists`` as `group_pairs` makes them.

    Memory: one scratch of `CPU_SCRATCH_BYTES` or `DEVICE_SCRATCH_BYTES` per device, taken before anything changes.
    """
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
