"""Tables of tensor addresses and blocks, for kernels that process all tensors in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ema_dist.kernels.lists import flat_views

Row = tuple[Tensor, ...]
"""The live values of one tensor, then its average in each track, then the residual of each average if there are any."""


class AddressTables(NamedTuple):
    """Tells a kernel where the tensors are. Tables hold addresses only: keep the tensors as long as the tables."""

    value_addresses: Tensor
    """The address of each tensor of live values."""
    average_addresses: Tensor
    """The other columns of the rows, one after the other: each track's averages, then each track's residuals."""
    sizes: Tensor
    """The number of elements of each tensor."""
    block_tensors: Tensor
    """The index of each block's tensor, int32."""
    block_starts: Tensor
    """The first element of each block in its tensor."""


def make_address_tables(rows: Sequence[Row], *, block: int) -> AddressTables:
    """Tables for flat tensors in blocks of ``block`` elements, on the tensors' device. Memory: 12 bytes a block."""
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
    """Rows of tensors that an address and a size describe completely, and the indices of all rows."""

    rows: list[Row]
    """Flat views of the rows that have elements and are dense, with the same strides in all columns."""
    dense_indices: list[int]
    """The indices of these rows."""
    strided_indices: list[int]
    """The indices of rows with gaps, or with different strides."""


def find_dense_rows(*lists: list[Tensor]) -> DenseRows:
    """Separate the dense tensors from the strided ones; rows without elements are left out."""
    flat_by_index = [(index, flat_views(row)) for index, row in enumerate(zip(*lists, strict=True)) if row[0].numel()]
    dense = [(index, row) for index, row in flat_by_index if row]
    return DenseRows(
        [row for _, row in dense],
        [index for index, _ in dense],
        [index for index, row in flat_by_index if not row],
    )
