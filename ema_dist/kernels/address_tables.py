"""Where many tensors lie and which block of which tensor is whose turn: for kernels that take all in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ema_dist.kernels.lists import flat_views

Row = tuple[Tensor, ...]
"""The live values of one tensor, and each track's averages of it; then their remainders if there are any."""


class AddressTables(NamedTuple):
    """What a kernel reads before it reads tensors. They hold addresses: keep the tensors as long as these."""

    value_addresses: Tensor
    """Of the first list."""
    average_addresses: Tensor
    """Of each list after the first, all tensors, one list after the other."""
    sizes: Tensor
    """In elements."""
    block_tensors: Tensor
    """The tensor of each block, int32."""
    block_starts: Tensor
    """The first element of each block in its tensor."""


def make_address_tables(rows: Sequence[Row], *, block: int) -> AddressTables:
    """Tables for flat tensors in blocks of so many elements, on the tensors' device. Memory: 12 bytes a block."""
    addresses = torch.tensor([[tensor.data_ptr() for tensor in row] for row in rows], device="cpu")
    sizes = torch.tensor([row[0].numel() for row in rows], device="cpu")
    counts = (sizes + block - 1) // block
    tensors = torch.arange(len(rows), device="cpu").repeat_interleave(counts)
    starts = (torch.arange(len(tensors), device="cpu") - (counts.cumsum(0) - counts)[tensors]) * block
    cpu_tables = AddressTables(
        addresses[:, 0].contiguous(), addresses[:, 1:].t().contiguous(), sizes, tensors.int(), starts
    )
    return AddressTables(*(table.to(rows[0][0].device) for table in cpu_tables))


class DenseRows(NamedTuple):
    """Tensors by what can be done with them."""

    rows: list[Row]
    """Flat views of those that have elements and are dense, in the same order in all lists."""
    dense_indices: list[int]
    """Which ones these are."""
    strided_indices: list[int]
    """Which ones have gaps, or differ in their order."""


def find_dense_rows(*lists: list[Tensor]) -> DenseRows:
    """Sort out of which tensors one address and one size tell all."""
    flat_by_index = [(index, flat_views(row)) for index, row in enumerate(zip(*lists, strict=True)) if row[0].numel()]
    dense_indices = [(index, row) for index, row in flat_by_index if row]
    return DenseRows(
        [row for _, row in dense_indices],
        [index for index, _ in dense_indices],
        [index for index, row in flat_by_index if not row],
    )
