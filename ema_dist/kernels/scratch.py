"""Scratch tensors whose size is bounded, whatever the size of the model."""

from __future__ import annotations

import torch
from torch import Tensor

CPU_SCRATCH_BYTES = 2 * 2**20
"""Largest scratch on the CPU: small enough to stay in the cache."""

DEVICE_SCRATCH_BYTES = 64 * 2**20
"""Largest scratch on other devices: large enough for few launches."""

MIN_SCRATCH_BYTES = 4096
"""Smallest scratch that is tried if memory is short."""


def allocate_scratch(nbytes: int, device: torch.device) -> Tensor:
    """A scratch of ``nbytes`` bytes; if there is no memory for it, of half the size, down to `MIN_SCRATCH_BYTES`.

    Raises: RuntimeError when not even `MIN_SCRATCH_BYTES` can be allocated.
    """
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError):  # torch.OutOfMemoryError on a device, its base class on the CPU
        if nbytes <= MIN_SCRATCH_BYTES:
            raise
        return allocate_scratch(max(MIN_SCRATCH_BYTES, nbytes // 2), device)


def scratch_views(scratch: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Consecutive pieces of ``scratch`` in the shapes of ``tensors``."""
    sizes = [tensor.numel() for tensor in tensors]
    return [piece.view(tensor.shape) for piece, tensor in zip(scratch[: sum(sizes)].split(sizes), tensors, strict=True)]


def max_scratch_bytes(tensor: Tensor) -> int:
    """The size limit of a scratch on the device of ``tensor``."""
    return CPU_SCRATCH_BYTES if tensor.device.type == "cpu" else DEVICE_SCRATCH_BYTES


def chunk_elements(tensors: list[Tensor], *, itemsize: int) -> int:
    """Elements of a chunk: all elements of ``tensors``, or as many as fit into a scratch at ``itemsize`` bytes each."""
    return max(1, min(max_scratch_bytes(tensors[0]) // itemsize, sum(tensor.numel() for tensor in tensors)))
