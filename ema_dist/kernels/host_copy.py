"""Copies of many tensors in one buffer of the CPU's memory, by few copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64
"""Of each tensor in a buffer, in bytes."""

PACKED_BYTES = 16 * 2**20
"""Largest scratch on a device: enough for a copy to run at the speed of the bus."""


class ToHost:
    """Where copies of these tensors lie in a buffer, and how they get there.

    Tensors on a device are packed into a scratch there first, as many as go in, and the scratch is copied at once; a
    large one goes straight. It keeps views of the tensors: make another one when they move to other storage.

    Args:
        values: on any devices, of any dtypes.

    Memory: on each device a scratch of `PACKED_BYTES` at most.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        self._values = values
        self._places = list(_places(values))
        sizes: dict[torch.device, int] = {}
        for place in self._places:
            if place.is_packed:
                sizes[place.device] = max(place.nbytes, sizes.get(place.device, 0))
        # One for all of a device: its copies come one after the other.
        scratches = {device: torch.empty(size, dtype=torch.uint8, device=device) for device, size in sizes.items()}
        self._runs = [place.run(scratches[place.device] if place.is_packed else None) for place in self._places]

    def room(self, *, pinned: bool) -> HostCopy:
        """A buffer for them. Memory: their bytes on the CPU, out of the operating system's reach if pinned."""
        nbytes = self._places[-1].stop if self._places else 0
        buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        copies = {
            index: _view(buffer, start, value)
            for place in self._places
            for index, value, start in zip(place.indices, place.values, place.starts, strict=True)
        }
        targets = [
            [buffer[place.starts[0] : place.stop]] if place.is_packed else [copies[index] for index in place.indices]
            for place in self._places
        ]
        return HostCopy([copies[index] for index in range(len(copies))], targets, self._runs)


class HostCopy:
    """A buffer, and ``values``: views of it like the tensors that are copied there."""

    def __init__(self, values: list[Tensor], targets: Sequence[list[Tensor]], runs: Sequence[_Run]) -> None:
        self.values = values
        self._targets = targets
        self._runs = runs

    @torch.no_grad()
    def fill(self, *, non_blocking: Collection[torch.device] = ()) -> None:
        """Copy the tensors as they are now; these devices may do it later, in order."""
        for run, targets in zip(self._runs, self._targets, strict=True):
            if run.packed:
                torch._foreach_copy_(run.packed, run.values)
            torch._foreach_copy_(targets, run.sources, non_blocking=run.sources[0].device in non_blocking)


class _Run(NamedTuple):
    """Tensors that are copied together."""

    values: list[Tensor]
    packed: list[Tensor]
    """Where they are packed on their device; empty for those that go straight."""
    sources: list[Tensor]
    """What is copied to the CPU: they themselves, or the scratch."""


class _Place(NamedTuple):
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
    def is_packed(self) -> bool:
        return len(self.values) > 1 and is_packed(self.device)

    @property
    def nbytes(self) -> int:
        return self.stop - self.starts[0]

    def run(self, scratch: Tensor | None) -> _Run:
        if scratch is None:
            return _Run(self.values, [], self.values)
        starts = [start - self.starts[0] for start in self.starts]
        packed = [_view(scratch, start, value) for start, value in zip(starts, self.values, strict=True)]
        return _Run(self.values, packed, [scratch[: self.nbytes]])


def is_packed(device: torch.device) -> bool:
    """Whether copies from there cost by their number."""
    return device.type != "cpu"


def _places(values: Sequence[Tensor]) -> Iterator[_Place]:
    place = 0
    for batch in _batches(values):
        *starts, place = accumulate((_room(values[index]) for index in batch), initial=place)
        yield _Place(batch, [values[index] for index in batch], starts, place)


def _batches(values: Sequence[Tensor]) -> Iterator[list[int]]:
    """Tensors of one device and dtype, as many as a scratch holds where they are packed."""
    kinds: dict[object, list[int]] = {}
    for index, value in enumerate(values):
        kinds.setdefault((value.device, value.dtype), []).append(index)
    for indices in kinds.values():
        if is_packed(values[indices[0]].device):
            yield from _up_to(PACKED_BYTES, indices, values)
        else:
            yield indices


def _up_to(limit: int, indices: Iterable[int], values: Sequence[Tensor]) -> Iterator[list[int]]:
    """Runs of so many bytes at most; a larger tensor is one of its own."""
    batch: list[int] = []
    filled = 0
    for index in indices:
        size = _room(values[index])
        if batch and filled + size > limit:
            yield batch
            batch = []
            filled = 0
        batch.append(index)
        filled += size
    if batch:
        yield batch


def _room(value: Tensor) -> int:
    return -(-value.nbytes // ALIGNMENT) * ALIGNMENT


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """A piece of a buffer of bytes, as a tensor with the strides that ``torch.empty_like`` gives to averages too."""
    flat = buffer[start : start + like.nbytes].view(like.dtype)
    return flat.as_strided(like.shape, torch.empty_like(like, device="meta").stride(), flat.storage_offset())
