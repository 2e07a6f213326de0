"""Memory that is reused for each batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes to which each tensor in the buffer is aligned."""


class ReusableBuffer:
    """A buffer reused for each batch: allocating new memory takes as long as reading."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")

    def tensors(self, shapes_and_dtypes: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
        """Uninitialized tensors of these shapes and dtypes; they overwrite those of the call before."""
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in shapes_and_dtypes]
        ends = [*accumulate(size + -size % ALIGNMENT for size in sizes)]
        if ends and ends[-1] > self._bytes.numel():
            self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")  # frees the old memory first
            self._bytes = torch.empty(ends[-1], dtype=torch.uint8, device="cpu")
        return [
            self._bytes[start : start + size].view(dtype).view(shape)
            for start, size, (shape, dtype) in zip([0, *ends][: len(sizes)], sizes, shapes_and_dtypes, strict=True)
        ]
