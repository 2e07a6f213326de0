"""A checksum that finds tensors with different bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ema_dist.kernels.lists import chunks
from ema_dist.kernels.scratch import max_scratch_bytes


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """A 0-d int64 tensor on the same device, equal for tensors of equal bytes. Memory: a scratch of constant size."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    int_dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    # Three int64 temporaries for each element.
    max_bytes = tensor.element_size() * max_scratch_bytes(tensor) // 32
    for (pieces,) in chunks([tensor], max_bytes=max_bytes):
        for piece in pieces:
            bits = piece.view(int_dtype).reshape(-1).long()
            # Odd factors: an even one would drop the highest bit of a product modulo 2**64.
            odd_factors = torch.arange(1, 2 * bits.numel(), 2, device=tensor.device)
            total = total * 31 + (bits * odd_factors).sum()
    return total
