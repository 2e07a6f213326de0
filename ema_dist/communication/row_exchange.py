"""Replicas send each other the rows that each of them owns; one collective sends the rows of many tensors.

Rows are assigned as by ``Shard(0)``: ``ceil(rows / replicas)`` to each replica, fewer or none to the last ones. The
rows of a replica are contiguous in memory and follow those of the previous replica.

Nothing here loops over replicas: the number of operations depends on the number of tensors and of collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.kernels import copy_pairs, max_scratch_bytes
from ema_dist.sharding import all_gather, merge_bytes

ALIGNMENT = 16
"""Bytes: a multiple of the size of every dtype, so that bytes can be viewed as any of them."""


class _Piece(NamedTuple):
    """The part of a tensor that one collective sends; positions and sizes are in elements of the tensor."""

    tensor: Tensor
    start: int
    scratch_start: int
    numel: int


def part_numel(tensor: Tensor, replicas: int) -> int:
    """The number of elements in the first replica's rows; no other replica has more."""
    rows = tensor.shape[0]
    return -(-rows // replicas) * (tensor.numel() // max(1, rows))


def prepare_all_gather(tensors: Iterable[Tensor], group: ProcessGroup, device: torch.device) -> Callable[[], None]:
    """Returns a function that writes the rows of all replicas to ``tensors``; each part is padded to the largest one.

    The scratch is allocated here, because a rank that fails in the collective call would leave the others waiting.

    Args:
        tensors: dense and not empty, on one device; the first dimension is outermost in memory.
        device: the device from which ``group`` communicates.

    Collective: the returned function, over ``group``.
    Memory: a scratch; a second one if the tensors are not on ``device``.
    """
    replicas, replica = group.size(), group.rank()
    parts = [(tensor, part_numel(tensor, replicas)) for tensor in _by_itemsize(tensors)]
    part_of = {id(tensor): part for tensor, part in parts}
    max_bytes = max_scratch_bytes(parts[0][0]) // replicas // ALIGNMENT * ALIGNMENT
    rounds = list(_rounds(parts, max(ALIGNMENT, max_bytes)))
    scratch = _Scratch(replicas * max(nbytes for nbytes, _ in rounds), parts[0][0].device, device)

    def run() -> None:
        for row_bytes, pieces in rounds:
            packed: list[tuple[Tensor, Tensor]] = []
            received: list[tuple[Tensor, Tensor]] = []
            for tensor, start, scratch_start, numel in pieces:
                part, row_numel = part_of[id(tensor)], row_bytes // tensor.element_size()
                complete, last_numel = divmod(tensor.numel(), part)
                rows = _strided(tensor, (complete, numel), (part, 1), start)
                buffers = scratch.view(tensor.dtype, (complete, numel), (row_numel, 1), scratch_start)
                received.append((rows, buffers))
                last = complete * part + start, complete * row_numel + scratch_start, min(numel, last_numel - start)
                if last[2] > 0:
                    received.append(_pair(tensor, scratch, *last))
                if replica < complete:
                    packed.append((buffers[replica], rows[replica]))
                elif replica == complete and last[2] > 0:
                    packed.append(_pair(tensor, scratch, *last)[::-1])
            _copy(packed)
            own_row = scratch.stage(replica * row_bytes, row_bytes)
            # In place, as FSDP does it: the replica's own row is also its row of the result.
            all_gather(scratch.staged[: replicas * row_bytes], own_row, group=group)
            scratch.unstage(replicas * row_bytes)
            _copy(received)

    return run


def prepare_all_reduce(tensors: Iterable[Tensor], group: ProcessGroup, device: torch.device) -> Callable[[], None]:
    """As `prepare_all_gather`, without padding: each replica contributes its own rows, and zeros elsewhere."""
    replicas, replica = group.size(), group.rank()
    ordered = _by_itemsize(tensors)
    rounds = list(_rounds(((tensor, tensor.numel()) for tensor in ordered), max_scratch_bytes(ordered[0])))
    scratch = _Scratch(max(nbytes for nbytes, _ in rounds), ordered[0].device, device)

    def run() -> None:
        for nbytes, pieces in rounds:
            packed: list[tuple[Tensor, Tensor]] = []
            received: list[tuple[Tensor, Tensor]] = []
            for tensor, start, scratch_start, numel in pieces:
                part = part_numel(tensor, replicas)
                own_begin, own_end = (min(max(edge * part - start, 0), numel) for edge in (replica, replica + 1))
                for begin, end in ((0, own_begin), (own_begin, own_end), (own_end, numel)):
                    if begin < end:
                        pair = _pair(tensor, scratch, start + begin, scratch_start + begin, end - begin)
                        if (begin, end) == (own_begin, own_end):
                            packed.append(pair[::-1])
                        else:
                            received.append(pair)
            scratch.local[:nbytes].zero_()
            _copy(packed)
            merge_bytes(scratch.stage(0, nbytes), group)
            scratch.unstage(nbytes)
            _copy(received)

    return run


class _Scratch:
    """A byte buffer on the device of the tensors, and one of the same size on the device that communicates.

    Both are the same buffer if the devices are the same.
    """

    def __init__(self, nbytes: int, local_device: torch.device, device: torch.device) -> None:
        self.local = torch.empty(nbytes, dtype=torch.uint8, device=local_device)
        self.staged = self.local if device == local_device else torch.empty_like(self.local, device=device)
        self._by_dtype: dict[torch.dtype, Tensor] = {}

    def view(self, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int], start: int) -> Tensor:
        """Elements of ``local`` as ``dtype``."""
        if dtype not in self._by_dtype:
            self._by_dtype[dtype] = self.local.view(dtype)
        return self._by_dtype[dtype].as_strided(size, stride, start)

    def stage(self, start: int, nbytes: int) -> Tensor:
        """Copy bytes of ``local`` to the device that communicates, and return them there."""
        staged = self.staged[start : start + nbytes]
        if self.staged is not self.local:
            copy_pairs([(staged, self.local[start : start + nbytes])])
        return staged

    def unstage(self, nbytes: int) -> None:
        """Copy the first bytes back to ``local``."""
        if self.staged is not self.local:
            copy_pairs([(self.local[:nbytes], self.staged[:nbytes])])


def _rounds(tensors_and_counts: Iterable[tuple[Tensor, int]], max_bytes: int) -> Iterator[tuple[int, list[_Piece]]]:
    """Divide the first ``count`` elements of each tensor into rounds of at most ``max_bytes``.

    ``max_bytes`` is a multiple of `ALIGNMENT`.

    Yields: for each round, its aligned size in bytes and its pieces.
    """
    pieces, filled = list[_Piece](), 0
    for tensor, count in tensors_and_counts:
        itemsize, start = tensor.element_size(), 0
        while start < count:
            if filled == max_bytes:
                yield filled, pieces
                pieces, filled = list[_Piece](), 0
            numel = min(count - start, (max_bytes - filled) // itemsize)
            pieces.append(_Piece(tensor, start, filled // itemsize, numel))
            filled, start = filled + numel * itemsize, start + numel
    yield -(-filled // ALIGNMENT) * ALIGNMENT, pieces


def _by_itemsize(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Wider elements first: then each piece starts at a multiple of the size of its elements."""
    return sorted(tensors, key=Tensor.element_size, reverse=True)


def _strided(tensor: Tensor, size: Sequence[int], stride: Sequence[int], start: int) -> Tensor:
    """Elements of a dense tensor, counted in memory order."""
    return tensor.as_strided(size, stride, tensor.storage_offset() + start)


def _pair(tensor: Tensor, scratch: _Scratch, start: int, scratch_start: int, numel: int) -> tuple[Tensor, Tensor]:
    """The same contiguous elements in the tensor and in the scratch."""
    return _strided(tensor, (numel,), (1,), start), scratch.view(tensor.dtype, (numel,), (1,), scratch_start)


def _copy(pairs: Sequence[tuple[Tensor, ...]]) -> None:
    """Copy the second tensor of each pair to the first."""
    if pairs:
        targets, sources = ([*column] for column in zip(*pairs, strict=True))
        torch._foreach_copy_(targets, sources)
