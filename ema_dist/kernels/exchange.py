"""Two lists of tensors change places."""

from __future__ import annotations

import torch
from torch import Tensor

from ema_dist.kernels.lists import chunks
from ema_dist.kernels.scratch import make_scratch, views


@torch.no_grad()
def exchange_(lists: list[tuple[list[Tensor], list[Tensor]]]) -> None:
    """Let the contents of each pair change places, to the bit; ``lists`` as `paired` makes them.

    Memory: one scratch of `CPU_SCRATCH_BYTES` or `DEVICE_SCRATCH_BYTES` per device, taken before anything changes.
    """
    most: dict[torch.device, Tensor] = {}
    for left, _ in lists:
        scratch = make_scratch(left).view(torch.uint8)
        if scratch.nbytes > most.get(scratch.device, scratch[:0]).nbytes:
            most[scratch.device] = scratch
    for left, right in lists:
        size = left[0].element_size()
        room = most.get(left[0].device, left[0].new_empty(0).view(torch.uint8))
        scratch = room[: room.nbytes // size * size].view(left[0].dtype)
        for ours, theirs in chunks(left, right, limit=scratch.nbytes):
            kept = views(scratch, ours)
            torch._foreach_copy_(kept, ours)
            torch._foreach_copy_(ours, theirs)
            torch._foreach_copy_(theirs, kept)
