"""Copies of many tensors in one buffer of the CPU's memory, by few copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64
"""Of each tensor in a buffer, in bytes."""

MAX_PACKED_BYTES = 16 * 2**20
"""Largest scratch on a device: enough for a copy to run at the speed of the bus."""


class HostCopier:
    """Where copies of these tensors lie in a buffer, and how they get there.

    Tensors on a device are packed into a scratch there first, as many as go in, and the scratch is copied at once; a
    large one goes straight. It keeps views of the tensors: make another one when they move to other storage.

    Args:
        values: on any devices, of any dtypes.

    Memory: on each device a scratch of `MAX_PACKED_BYTES` at most.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        self._values = values
        self._blocks = list(_blocks(values))
        sizes: dict[torch.device, int] = {}
        for block in self._blocks:
            if block.needs_packing:
                sizes[block.device] = max(block.nbytes, sizes.get(block.device, 0))
        # One for all of a device: its copies come one after the other.
        scratches = {device: torch.empty(size, dtype=torch.uint8, device=device) for device, size in sizes.items()}
        self._block_copies = [
            block.block_copy(scratches[block.device] if block.needs_packing else None) for block in self._blocks
        ]

    def host_buffer(self, *, pinned: bool) -> HostBuffer:
        """A buffer for them. Memory: their bytes on the CPU, out of the operating system's reach if pinned."""
        nbytes = self._blocks[-1].stop if self._blocks else 0
        buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        copies = {
            index: _view(buffer, start, value)
            for block in self._blocks
            for index, value, start in zip(block.indices, block.values, block.starts, strict=True)
        }
        targets = [
            [buffer[block.starts[0] : block.stop]]
            if block.needs_packing
            else [copies[index] for index in block.indices]
            for block in self._blocks
        ]
        return HostBuffer([copies[index] for index in range(len(copies))], targets, self._block_copies)


class HostBuffer:
    """A buffer, and ``values``: views of it like the tensors that are copied there."""

    def __init__(
        self, values: list[Tensor], targets: Sequence[list[Tensor]], block_copies: Sequence[_BlockCopy]
    ) -> None:
        self.values = values
        self._targets = targets
        self._block_copies = block_copies

    @torch.no_grad()
    def fill(self, *, non_blocking: Collection[torch.device] = ()) -> None:
        """Copy the tensors as they are now; these devices may do it later, in order."""
        for block_copy, targets in zip(self._block_copies, self._targets, strict=True):
            if block_copy.packed:
                torch._foreach_copy_(block_copy.packed, block_copy.values)
            torch._foreach_copy_(targets, block_copy.sources, non_blocking=block_copy.sources[0].device in non_blocking)


class _BlockCopy(NamedTuple):
    """Tensors that are copied together."""

    values: list[Tensor]
    packed: list[Tensor]
    """Where they are packed on their device; empty for those that go straight."""
    sources: list[Tensor]
    """What is copied to the CPU: they themselves, or the scratch."""


class _Block(NamedTuple):
    """Tensors of one device and dtype whose copies lie side by side."""

    indices: list[int]
    values: list[Tensor]
    starts: list[int]
    """Of each, in bytes."""
    stop: int

    @property
    def device(self) -> torch.device:
        return self.values[0].device

    @property
    def needs_packing(self) -> bool:
        return len(self.values) > 1 and needs_packing(self.device)

    @property
    def nbytes(self) -> int:
        return self.stop - self.starts[0]

    def block_copy(self, scratch: Tensor | None) -> _BlockCopy:
        if scratch is None:
            return _BlockCopy(self.values, [], self.values)
        starts = [start - self.starts[0] for start in self.starts]
        packed = [_view(scratch, start, value) for start, value in zip(starts, self.values, strict=True)]
        return _BlockCopy(self.values, packed, [scratch[: self.nbytes]])


def needs_packing(device: torch.device) -> bool:
    """Whether copies from there cost by their number."""
    return device.type != "cpu"


def _blocks(values: Sequence[Tensor]) -> Iterator[_Block]:
    stop = 0
    for batch in _batches(values):
        *starts, stop = accumulate((_aligned_bytes(values[index]) for index in batch), initial=stop)
        yield _Block(batch, [values[index] for index in batch], starts, stop)


def _batches(values: Sequence[Tensor]) -> Iterator[list[int]]:
    """Tensors of one device and dtype, as many as a scratch holds where they are packed."""
    by_device_dtype: dict[object, list[int]] = {}
    for index, value in enumerate(values):
        by_device_dtype.setdefault((value.device, value.dtype), []).append(index)
    for indices in by_device_dtype.values():
        if needs_packing(values[indices[0]].device):
            yield from _split_by_bytes(MAX_PACKED_BYTES, indices, values)
        else:
            yield indices


def _split_by_bytes(max_bytes: int, indices: Iterable[int], values: Sequence[Tensor]) -> Iterator[list[int]]:
    """Runs of so many bytes at most; a larger tensor is one of its own."""
    batch: list[int] = []
    batch_bytes = 0
    for index in indices:
        size = _aligned_bytes(values[index])
        if batch and batch_bytes + size > max_bytes:
            yield batch
            batch = []
            batch_bytes = 0
        batch.append(index)
        batch_bytes += size
    if batch:
        yield batch


def _aligned_bytes(value: Tensor) -> int:
    return -(-value.nbytes // ALIGNMENT) * ALIGNMENT


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """A piece of a buffer of bytes, as a tensor with the strides that ``torch.empty_like`` gives to averages too."""
    flat = buffer[start : start + like.nbytes].view(like.dtype)
    return flat.as_strided(like.shape, torch.empty_like(like, device="meta").stride(), flat.storage_offset())
