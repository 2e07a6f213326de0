"""Tensors that FSDP1 has flattened: this rank's run of elements, cut anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.metadata import ShardMetadata  # FSDP1's own checkpoint format has no public name
from torch.distributed._shard.sharded_tensor import Shard as Block
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec

from ema_dist.sharding.shard import Shard, flat, memory_order

Run = tuple[int, int]
"""First element and one past the last, counted in the memory order of the full tensor."""


class FlatShard(Shard):
    """A run of the tensor's elements, one-dimensional, often empty.

    In checkpoints a run becomes the few rectangles it covers, which view the same storage unless dimensions are
    permuted in memory: nothing is sent, and DCP reshards them like any other tensor.

    Args:
        runs: the run of each rank of ``group``, by group rank.
        stride: of the full tensor; dense, else FSDP1 could not have flattened it.
        device: where FSDP1 computes and communicates; ``local`` may be offloaded from it.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        local: Tensor,
        owner: Tensor,
        *,
        runs: Sequence[Run],
        shape: torch.Size,
        stride: tuple[int, ...],
        group: ProcessGroup,
        device: torch.device,
        replicas: ProcessGroup | None = None,
    ) -> None:
        super().__init__(names, local, owner, replicas=replicas)
        self.runs = tuple(runs)
        self._shape = shape
        self.stride = stride
        self._group = group
        self._device = device

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def first(self) -> int:
        return self.runs[self._group.rank()][0]

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(dist.get_process_group_ranks(self._group))

    @property
    def group(self) -> ProcessGroup | None:
        return self._group

    def wrap(self, local: Tensor) -> Tensor:
        offset = self.runs[self._group.rank()][0]
        blocks: list[Block] = []
        metadata: list[ShardMetadata] = []
        for group_rank, run in enumerate(self.runs):
            place = f"rank:{dist.get_global_rank(self._group, group_rank)}/{local.device}"
            for start, corner, sizes in self._rectangles(run):
                metadata.append(ShardMetadata(corner, sizes, place))
                if group_rank == self._group.rank():
                    block = self._view(local[start - offset : start - offset + prod(sizes)], sizes)
                    blocks.append(Block(block, metadata[-1]))
        return (
            ShardedTensor._init_from_local_shards_and_global_metadata(  # the public form gathers what each rank knows
                blocks,
                ShardedTensorMetadata(metadata, self._shape, TensorProperties(dtype=local.dtype)),
                process_group=self._group,
                sharding_spec=EnumerableShardingSpec(metadata),
            )
        )

    def unwrap(self, value: Tensor) -> Tensor:
        if not isinstance(value, ShardedTensor):
            return self.cut(value)
        mine = self._rectangles(self.runs[self._group.rank()])
        expected = self._shape, [(corner, sizes) for _, corner, sizes in mine]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates what FSDP1 saves as
            blocks, size = value.local_shards(), value.size()
        found = size, [(list(b.metadata.shard_offsets), list(b.metadata.shard_sizes)) for b in blocks]
        if found != expected:
            raise ValueError(f"expected shape and cut {expected}, got {found}")
        order = self._memory_order()
        runs = [block.tensor.permute(order).reshape(-1) for block in blocks]
        return torch.cat(runs) if runs else self.local.new_empty(0)

    def full(self, local: Tensor) -> Tensor:
        whole = torch.empty_strided(self._shape, self.stride, dtype=local.dtype, device=self._device)
        for group_rank, (start, stop) in enumerate(self.runs):
            if start == stop:
                continue
            piece = flat(whole)[start:stop]
            if group_rank == self._group.rank():
                piece.copy_(local)
            dist.broadcast(piece, dist.get_global_rank(self._group, group_rank), group=self._group)
        return whole

    def cut(self, full: Tensor) -> Tensor:
        if full.shape != self._shape:
            raise ValueError(f"expected {tuple(self._shape)}, got {tuple(full.shape)}")
        start, stop = self.runs[self._group.rank()]
        return full.permute(self._memory_order()).reshape(-1)[start:stop]

    @property
    def layout(self) -> str:
        copies = "" if self.replicas is None else f", on each of {self.replicas.size()} replicas"
        return f"flat over {self._group.size()} ranks{copies}"

    def describe(self) -> str:
        ranks = dist.get_process_group_ranks(self._group)
        return f"{tuple(self._shape)}, strides {self.stride}, flat runs {self.runs} over ranks {ranks}"

    def _memory_order(self) -> list[int]:
        order = memory_order(self._shape, self.stride)
        assert order is not None, "FSDP1 flattens dense tensors only"
        return order

    def _view(self, run: Tensor, sizes: Sequence[int]) -> Tensor:
        order = self._memory_order()
        ordered = run.view([sizes[dim] for dim in order])
        # ShardedTensor takes contiguous blocks only; where dimensions are permuted in memory, that is a copy.
        return ordered.permute([order.index(dim) for dim in range(len(order))]).contiguous()

    def _rectangles(self, run: Run) -> list[tuple[int, list[int], list[int]]]:
        """Start in memory order, corner and sizes of each rectangle that ``run`` covers; one without rows if none."""
        if run[0] == run[1]:  # DCP passes over a tensor that has no block here, and then misses it in the checkpoint
            return [(run[0], [self._shape[0], *[0] * (len(self._shape) - 1)], [0, *self._shape[1:]])]
        order = self._memory_order()
        found = []
        for start, corner, sizes in rectangles(run, [self._shape[dim] for dim in order]):
            back = [order.index(dim) for dim in range(len(order))]
            found.append((start, [corner[at] for at in back], [sizes[at] for at in back]))
        return found


def rectangles(run: Run, shape: Sequence[int]) -> Iterator[tuple[int, list[int], list[int]]]:
    """The fewest blocks of a row-major tensor that together are ``run``: start, corner and sizes of each.

    A run of rows is one block; the ragged ends before and after it are runs of one row each, cut the same way.
    """
    start, stop = run
    if start == stop:
        return
    if not shape:
        yield start, [], []
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        yield from _within_row(last, run, shape)
        return
    if start < first * row:
        yield from _within_row(first - 1, (start, first * row), shape)
    if first < last:
        yield first * row, [first, *[0] * (len(shape) - 1)], [last - first, *shape[1:]]
    if last * row < stop:
        yield from _within_row(last, (last * row, stop), shape)


def _within_row(index: int, run: Run, shape: Sequence[int]) -> Iterator[tuple[int, list[int], list[int]]]:
    base = index * prod(shape[1:])
    for start, corner, sizes in rectangles((run[0] - base, run[1] - base), shape[1:]):
        yield base + start, [index, *corner], [1, *sizes]
