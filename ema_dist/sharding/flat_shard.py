"""Tensors that FSDP1 has flattened: this rank holds a range of elements, which may begin and end anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.metadata import ShardMetadata  # FSDP1's own checkpoint format has no public name
from torch.distributed._shard.sharded_tensor import Shard as Block
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec

from ema_dist.sharding.gather_rows import as_bytes
from ema_dist.sharding.rank_sets import group_ranks
from ema_dist.sharding.shard import CopyFunction, Shard, flat_view, memory_order

ElementRange = tuple[int, int]
"""The first element and one past the last, counted in the memory order of the full tensor."""


@dataclass(frozen=True)
class FlatRanges:
    """The range of one tensor's elements that each rank holds; all ranks hold parts of the flat parameter of one size.

    Args:
        start: the position of the tensor's first element in the flat parameter.
        numel: the number of elements of the tensor.
        shard_numel: the number of elements of each rank's part.
    """

    start: int
    numel: int
    shard_numel: int

    def of_rank(self, rank: int) -> ElementRange:
        """The range of one rank, counted from the first element of the tensor."""
        first = min(max(rank * self.shard_numel - self.start, 0), self.numel)
        last = min(max((rank + 1) * self.shard_numel - self.start, 0), self.numel)
        return (first, last) if first < last else (0, 0)

    @property
    def holders(self) -> range:
        """The ranks that hold elements."""
        if not self.numel:
            return range(0)
        return range(self.start // self.shard_numel, (self.start + self.numel - 1) // self.shard_numel + 1)


class Rectangle(NamedTuple):
    """A rectangular block of the full tensor whose elements are contiguous in memory."""

    start: int
    """Its first element, counted in the memory order of the full tensor."""
    offsets: list[int]
    sizes: list[int]


class FlatShard(Shard):
    """A range of the tensor's elements, one-dimensional and often empty.

    In checkpoints it becomes the few rectangles that it covers. They are views of the same storage unless
    dimensions are permuted in memory. Making them needs no communication, and DCP reshards them like any other tensor.

    Args:
        ranges: the ranges of the ranks of ``group``, by group rank.
        stride: the strides of the full tensor, which is dense: FSDP1 flattens dense tensors only.
        device: the device on which FSDP1 computes and communicates; ``local`` may be offloaded from it.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        local: Tensor,
        owner: Tensor,
        *,
        ranges: FlatRanges,
        shape: torch.Size,
        stride: tuple[int, ...],
        group: ProcessGroup,
        device: torch.device,
        replica_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(names, local, owner, replica_group=replica_group)
        self.ranges = ranges
        self._shape = shape
        self.stride = stride
        self._group = group
        self._device = device

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def global_offset(self) -> int:
        return self._own_range[0]

    @property
    def communication_device(self) -> torch.device:
        return self._device

    @property
    def gather_ranks(self) -> frozenset[int]:
        return group_ranks(self._group).as_set

    @property
    def gather_group(self) -> ProcessGroup | None:
        return self._group

    def wrap(self, local: Tensor) -> Tensor:
        blocks: list[Block] = []
        metadata: list[ShardMetadata] = []
        ranks, own_rank = group_ranks(self._group).ranks, self._group.rank()
        # DCP needs a block of this rank even if it is empty. Empty blocks of other ranks, perhaps many, are left out.
        for group_rank in sorted({*self.ranges.holders, own_rank}):
            placement = f"rank:{ranks[group_rank]}/{local.device}"
            for start, offsets, sizes in self._rectangles(self.ranges.of_rank(group_rank)):
                metadata.append(ShardMetadata(offsets, sizes, placement))
                if group_rank == own_rank:
                    begin = start - self.global_offset
                    block = self._view_block(local[begin : begin + prod(sizes)], sizes)
                    blocks.append(Block(block, metadata[-1]))
        # The public constructor is collective: it gathers the metadata of all ranks.
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            blocks,
            ShardedTensorMetadata(metadata, self._shape, TensorProperties(dtype=local.dtype)),
            process_group=self._group,
            sharding_spec=EnumerableShardingSpec(metadata),
        )

    def unwrap(self, value: Tensor) -> Tensor:
        if not isinstance(value, ShardedTensor):
            return self.slice_full(value)
        own_rectangles = self._rectangles(self._own_range)
        expected = self._shape, [(offsets, sizes) for _, offsets, sizes in own_rectangles]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates the type that FSDP1 saves
            blocks, size = value.local_shards(), value.size()
        actual = size, [(list(block.metadata.shard_offsets), list(block.metadata.shard_sizes)) for block in blocks]
        if actual != expected:
            raise ValueError(f"expected shape and blocks {expected}, got {actual}")
        order = self._memory_order()
        pieces = [block.tensor.permute(order).reshape(-1) for block in blocks]
        return torch.cat(pieces) if pieces else self.local.new_empty(0)

    def full(self, local: Tensor, copy_local: CopyFunction = Tensor.copy_) -> Tensor:
        gathered = torch.empty_strided(self._shape, self.stride, dtype=local.dtype, device=self._device)
        ranks = group_ranks(self._group).ranks
        for group_rank in self.ranges.holders:
            start, stop = self.ranges.of_rank(group_rank)
            piece = flat_view(gathered)[start:stop]
            if group_rank == self._group.rank():
                copy_local(piece, local)
            dist.broadcast(as_bytes(piece), ranks[group_rank], group=self._group)
        return gathered

    def slice_full(self, full: Tensor) -> Tensor:
        if full.shape != self._shape:
            raise ValueError(f"expected {tuple(self._shape)}, got {tuple(full.shape)}")
        start, stop = self._own_range
        return full.permute(self._memory_order()).reshape(-1)[start:stop]

    @property
    def summary(self) -> str:
        copies = "" if self.replica_group is None else f", on each of {self.replica_group.size()} replicas"
        return f"flat over {self._group.size()} ranks{copies}"

    def sharding_key(self) -> tuple[object, ...]:
        return tuple(self._shape), self.stride, self.ranges, group_ranks(self._group)

    @property
    def sharding_text(self) -> str:
        start, stop = self._own_range
        return (
            f"elements {start} to {stop} on this rank of a tensor of shape {tuple(self._shape)} and strides "
            f"{self.stride}, flat over ranks {group_ranks(self._group).text}"
        )

    @property
    def _own_range(self) -> ElementRange:
        return self.ranges.of_rank(self._group.rank())

    def _memory_order(self) -> list[int]:
        order = memory_order(self._shape, self.stride)
        assert order is not None, "FSDP1 flattens dense tensors only"
        return order

    def _view_block(self, elements: Tensor, sizes: Sequence[int]) -> Tensor:
        order = self._memory_order()
        ordered = elements.view([sizes[dim] for dim in order])
        # ShardedTensor accepts contiguous blocks only; if dimensions are permuted in memory, this copies.
        return ordered.permute([order.index(dim) for dim in range(len(order))]).contiguous()

    def _rectangles(self, element_range: ElementRange) -> list[Rectangle]:
        """The rectangles that cover ``element_range``, in the tensor's dimensions; if it is empty, one without rows."""
        start, stop = element_range
        if start == stop:  # DCP skips a tensor without blocks on this rank when saving, and requires it when loading
            return [Rectangle(start, [self._shape[0], *[0] * (len(self._shape) - 1)], [0, *self._shape[1:]])]
        order = self._memory_order()
        inverse_order = [order.index(dim) for dim in range(len(order))]
        return [
            Rectangle(start, [offsets[dim] for dim in inverse_order], [sizes[dim] for dim in inverse_order])
            for start, offsets, sizes in rectangles(element_range, [self._shape[dim] for dim in order])
        ]


def rectangles(element_range: ElementRange, shape: Sequence[int]) -> Iterator[Rectangle]:
    """The fewest rectangles of a row-major tensor that together cover exactly ``element_range``.

    The complete rows are one rectangle; the parts of a row before and after them are divided recursively.
    """
    start, stop = element_range
    if start == stop:
        return
    if not shape:
        yield Rectangle(start, [], [])
        return
    row = prod(shape[1:])
    first_row, end_row = -(-start // row), stop // row
    if first_row > end_row:  # inside one row
        yield from _within_row(end_row, element_range, shape)
        return
    if start < first_row * row:
        yield from _within_row(first_row - 1, (start, first_row * row), shape)
    if first_row < end_row:
        yield Rectangle(first_row * row, [first_row, *[0] * (len(shape) - 1)], [end_row - first_row, *shape[1:]])
    if end_row * row < stop:
        yield from _within_row(end_row, (end_row * row, stop), shape)


def _within_row(index: int, element_range: ElementRange, shape: Sequence[int]) -> Iterator[Rectangle]:
    row_start = index * prod(shape[1:])
    for start, offsets, sizes in rectangles((element_range[0] - row_start, element_range[1] - row_start), shape[1:]):
        yield Rectangle(row_start + start, [index, *offsets], [1, *sizes])
