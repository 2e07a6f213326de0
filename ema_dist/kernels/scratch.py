"""Temporaries of bounded size, whatever the tensors' sizes."""

from __future__ import annotations

import torch
from torch import Tensor

CPU_SCRATCH_BYTES = 2 * 2**20
"""Largest temporary on the CPU: it stays in the cache."""

DEVICE_SCRATCH_BYTES = 64 * 2**20
"""Largest temporary elsewhere: few launches for large models."""


def make_scratch(tensors: list[Tensor]) -> Tensor:
    """A flat tensor of their dtype on their device that holds all of them, or as many as one scratch may."""
    first = tensors[0]
    needed = sum(tensor.numel() for tensor in tensors)
    return torch.empty(
        min(needed, max_scratch_bytes(first) // first.element_size()), dtype=first.dtype, device=first.device
    )


def scratch_views(scratch: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Consecutive pieces of ``scratch`` in the shapes of ``tensors``."""
    sizes = [tensor.numel() for tensor in tensors]
    return [piece.view(tensor.shape) for piece, tensor in zip(scratch[: sum(sizes)].split(sizes), tensors, strict=True)]


def max_scratch_bytes(tensor: Tensor) -> int:
    """The largest temporary where ``tensor`` is."""
    return CPU_SCRATCH_BYTES if tensor.device.type == "cpu" else DEVICE_SCRATCH_BYTES


def chunk_elements(tensors: list[Tensor], *, itemsize: int) -> int:
    """How many elements an update takes at a time: all of ``tensors``, or what fits into a scratch at ``itemsize``."""
    return max(1, min(max_scratch_bytes(tensors[0]) // itemsize, sum(tensor.numel() for tensor in tensors)))
