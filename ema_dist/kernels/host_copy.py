"""Copies many tensors into one buffer in host memory, in few transfers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes to which the start of each tensor in a buffer is aligned."""

MAX_PACKED_BYTES = 16 * 2**20
"""Largest scratch on a device: large enough for a transfer to reach the bandwidth of the bus."""


class HostCopier:
    """Plans the copies of tensors into a host buffer: the offset of each copy, and the transfers.

    Tensors on a device are packed into a scratch there, as many as fit, and one transfer copies the scratch; a large
    tensor is transferred by itself. It keeps views of the tensors: make another copier when they get other storage.

    Args:
        values: tensors on any devices, of any dtypes.

    Memory: a scratch of at most `MAX_PACKED_BYTES` on each device.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        self._values = values
        self._batches = list(_batches(values))
        sizes: dict[torch.device, int] = {}
        for batch in self._batches:
            if batch.needs_packing:
                sizes[batch.device] = max(batch.nbytes, sizes.get(batch.device, 0))
        # One scratch for all batches of a device: transfers of one device run in order.
        scratches = {device: torch.empty(size, dtype=torch.uint8, device=device) for device, size in sizes.items()}
        self._batch_copies = [
            batch.batch_copy(scratches[batch.device] if batch.needs_packing else None) for batch in self._batches
        ]

    def host_buffer(self, *, pinned: bool) -> HostBuffer:
        """A buffer for copies of the tensors. Memory: their bytes on the host, page-locked if ``pinned``."""
        nbytes = self._batches[-1].stop if self._batches else 0
        buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        copies = {
            index: _view(buffer, start, value)
            for batch in self._batches
            for index, value, start in zip(batch.indices, batch.values, batch.starts, strict=True)
        }
        targets = [
            [buffer[batch.starts[0] : batch.stop]]
            if batch.needs_packing
            else [copies[index] for index in batch.indices]
            for batch in self._batches
        ]
        return HostBuffer([copies[index] for index in range(len(copies))], targets, self._batch_copies)


class HostBuffer:
    """A host buffer; ``values`` are views of it, with the shapes and dtypes of the tensors that are copied there."""

    def __init__(
        self, values: list[Tensor], targets: Sequence[list[Tensor]], batch_copies: Sequence[_BatchCopy]
    ) -> None:
        self.values = values
        self._targets = targets
        self._batch_copies = batch_copies

    @torch.no_grad()
    def fill(self, *, non_blocking: Collection[torch.device] = ()) -> None:
        """Copy the tensors as they are now; on the devices in ``non_blocking``, the copy is only enqueued."""
        for batch_copy, targets in zip(self._batch_copies, self._targets, strict=True):
            if batch_copy.packed:
                torch._foreach_copy_(batch_copy.packed, batch_copy.values)
            sources = batch_copy.sources
            if batch_copy.has_lazy_sources:  # else torch conjugates the copies on the host, before they have arrived
                sources = [source.resolve_conj().resolve_neg() for source in sources]
            torch._foreach_copy_(targets, sources, non_blocking=sources[0].device in non_blocking)


class _BatchCopy(NamedTuple):
    """The tensors of one batch, and the tensors that are transferred for them."""

    values: list[Tensor]
    packed: list[Tensor]
    """Views of the scratch into which they are packed; empty if they are transferred directly."""
    sources: list[Tensor]
    """The tensors that are transferred to the host: the values themselves, or the scratch."""
    has_lazy_sources: bool = False
    """Whether sources are lazily conjugated or negated complex tensors."""


class _Batch(NamedTuple):
    """Tensors of one device and dtype whose copies are adjacent in the buffer."""

    indices: list[int]
    values: list[Tensor]
    starts: list[int]
    """Where each copy starts in the buffer, in bytes."""
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

    def batch_copy(self, scratch: Tensor | None) -> _BatchCopy:
        if scratch is None:
            has_lazy_sources = any(value.is_conj() or value.is_neg() for value in self.values)
            return _BatchCopy(self.values, [], self.values, has_lazy_sources)
        starts = [start - self.starts[0] for start in self.starts]
        packed = [_view(scratch, start, value) for start, value in zip(starts, self.values, strict=True)]
        return _BatchCopy(self.values, packed, [scratch[: self.nbytes]])


def needs_packing(device: torch.device) -> bool:
    """Whether each transfer from ``device`` has a fixed cost, so that packing small tensors saves time."""
    return device.type != "cpu"


def _batches(values: Sequence[Tensor]) -> Iterator[_Batch]:
    stop = 0
    for indices in _batch_indices(values):
        *starts, stop = accumulate((_aligned_bytes(values[index]) for index in indices), initial=stop)
        yield _Batch(indices, [values[index] for index in indices], starts, stop)


def _batch_indices(values: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors of one device and dtype: as many as fit into a scratch, if they are packed."""
    by_device_dtype: dict[object, list[int]] = {}
    for index, value in enumerate(values):
        by_device_dtype.setdefault((value.device, value.dtype), []).append(index)
    for indices in by_device_dtype.values():
        if needs_packing(values[indices[0]].device):
            yield from _split_by_bytes(MAX_PACKED_BYTES, indices, values)
        else:
            yield indices


def _split_by_bytes(max_bytes: int, indices: Iterable[int], values: Sequence[Tensor]) -> Iterator[list[int]]:
    """Batches of at most ``max_bytes``; a larger tensor is a batch of its own."""
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
    """A view of part of a byte buffer, with the strides of ``torch.empty_like(like)``, which averages have too."""
    flat = buffer[start : start + like.nbytes].view(like.dtype)
    return flat.as_strided(like.shape, torch.empty_like(like, device="meta").stride(), flat.storage_offset())
