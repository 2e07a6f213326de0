"""Where many tensors lie and which block of which tensor is whose turn: for kernels that take all in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ema_dist.kernels.chunked import InChunks
from ema_dist.kernels.lists import flattened

Row = tuple[Tensor, ...]
"""The live values of one tensor, and each track's averages of it."""


class Tables(NamedTuple):
    """What a kernel reads before it reads tensors. They hold addresses: keep the tensors as long as these."""

    value_addresses: Tensor
    average_addresses: Tensor
    """Of each track the averages of all tensors, one track after the other."""
    sizes: Tensor
    """In elements."""
    block_tensors: Tensor
    """The tensor of each block, int32."""
    block_starts: Tensor
    """The first element of each block in its tensor."""


def tables(rows: Sequence[Row], *, block: int) -> Tables:
    """Tables for flat tensors in blocks of so many elements, on the tensors' device. Memory: 12 bytes a block."""
    addresses = torch.tensor([[tensor.data_ptr() for tensor in row] for row in rows])
    sizes = torch.tensor([row[0].numel() for row in rows])
    counts = (sizes + block - 1) // block
    tensors = torch.arange(len(rows)).repeat_interleave(counts)
    starts = (torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]) * block
    found = Tables(addresses[:, 0].contiguous(), addresses[:, 1:].t().contiguous(), sizes, tensors.int(), starts)
    return Tables(*(table.to(rows[0][0].device) for table in found))


def flat_rows(
    tracks: Sequence[list[Tensor]], values: list[Tensor], *, finite: bool
) -> tuple[list[Row], list[InChunks]]:
    """Flat views of all tensors that have elements, and what moves those of which there are none.

    These have gaps, or are laid out otherwise than their averages.
    """
    rows = [row for row in zip(values, *tracks, strict=True) if row[0].numel()]
    views = [flattened(row) for row in rows]
    others = [row for row, flat in zip(rows, views, strict=True) if flat is None]
    if not others:
        return [flat for flat in views if flat], []
    strided, *averages = (list(column) for column in zip(*others, strict=True))
    return [flat for flat in views if flat], [InChunks(averages, strided, finite=finite)]
