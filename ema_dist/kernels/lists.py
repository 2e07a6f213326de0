"""Lists of tensors for one call: grouped by device and dtype, and split into chunks of bounded size."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T", bound=Hashable)


def group_pairs(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Groups pairs into lists that one call can process: all on one device, and of one dtype on each side."""
    return [(left, right) for left, right in group_rows(pairs)]


def group_rows(rows: Iterable[Sequence[Tensor]]) -> list[list[list[Tensor]]]:
    """Groups rows by device and by the dtype of each column; returns the columns of each group."""
    rows_by_index = dict(enumerate(rows))
    groups = [[rows_by_index[index] for index in indices] for indices in group_by_dtype(rows_by_index)]
    return [[list(column) for column in zip(*group, strict=True)] for group in groups]


def group_by_dtype(rows: Mapping[T, Sequence[Tensor]]) -> list[list[T]]:
    """Groups the keys of rows that one call can process: all on one device, and of one dtype in each column."""
    groups: dict[object, list[T]] = {}
    for key, row in rows.items():
        groups.setdefault((row[0].device, *(tensor.dtype for tensor in row)), []).append(key)
    return list(groups.values())


SMALL_NUMEL = 2**14
"""Up to this size, the overhead of a call takes longer than processing the elements of a tensor."""


def is_small(tensors: list[Tensor]) -> bool:
    """Whether the tensors have at most `SMALL_NUMEL` elements on average."""
    return sum(tensor.numel() for tensor in tensors) <= SMALL_NUMEL * len(tensors)


def chunks(*lists: list[Tensor], max_bytes: int) -> Iterator[tuple[list[Tensor], ...]]:
    """Split the lists into chunks of at most ``max_bytes`` bytes of the first list; large tensors become several views.

    The pieces of a tensor are in row-major order: each piece begins where the previous one ends.
    """
    batch = _empty_lists(len(lists))
    filled = 0
    for row in zip(*lists, strict=True):
        for pieces in _split_row(row, max_bytes):
            size = pieces[0].numel() * pieces[0].element_size()
            if filled and filled + size > max_bytes:
                yield batch
                batch, filled = _empty_lists(len(lists)), 0
            for column, piece in zip(batch, pieces, strict=True):
                column.append(piece)
            filled += size
    if filled:
        yield batch


def flat_chunks(*lists: list[Tensor], elements: int) -> Iterator[tuple[list[Tensor], ...]]:
    """As `chunks`, of at most ``elements`` elements; tensors that are dense with equal strides become flat views."""
    if lists[0]:
        rows = [flat_views(row) or row for row in zip(*lists, strict=True)]
        columns = [list(column) for column in zip(*rows, strict=True)]
        yield from chunks(*columns, max_bytes=elements * lists[0][0].element_size())


def flat_views(row: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """1-D views of the tensors in memory order; None unless all are dense with equal strides."""
    first = row[0]
    if not all(tensor.is_contiguous() for tensor in row):
        if any(tensor.stride() != first.stride() for tensor in row):
            return None
        order = sorted(range(first.dim()), key=first.stride, reverse=True)
        row = tuple(tensor.permute(order) for tensor in row)
        if not row[0].is_contiguous():
            return None
    return tuple(tensor.view(-1) for tensor in row)


def _empty_lists(count: int) -> tuple[list[Tensor], ...]:
    return tuple([] for _ in range(count))


def _split_row(row: tuple[Tensor, ...], max_bytes: int) -> Iterator[tuple[Tensor, ...]]:
    """Split one tensor of each list along the first dimension longer than 1, until pieces fit into ``max_bytes``."""
    first = row[0]
    size = first.numel() * first.element_size()
    if size <= max_bytes or first.numel() == 1:
        yield row
        return
    dim = next(dim for dim in range(first.dim()) if first.size(dim) > 1)
    per_piece = max(1, first.size(dim) * max_bytes // size)
    for pieces in zip(*(tensor.split(per_piece, dim) for tensor in row), strict=True):
        yield from _split_row(pieces, max_bytes)
