"""Arithmetic on lists of plain local tensors: no names, no modules, no collectives.

The tensors of one list share a device and a dtype; lists are paired by position and pairs have equal shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

CPU_SCRATCH_BYTES = 2 * 2**20
"""Largest temporary of an update on the CPU: it stays in the cache."""

DEVICE_SCRATCH_BYTES = 64 * 2**20
"""Largest temporary of an update elsewhere: few launches for large models."""


@torch.no_grad()
def lerp_(averages: list[Tensor], values: list[Tensor], weight: float | Tensor, *, finite: bool = True) -> None:
    """Move each average towards its value: ``average + weight * (value - average)``, in place.

    Args:
        weight: in [0, 1]; a 0-d tensor stays on the device, so that a step can be left out there without asking it.
        finite: False where infinities may occur (attention masks, observers): such elements follow the value, as the
            difference of two infinities is NaN and would stay.

    Memory: nothing for finite tensors of equal dtypes and a weight known here; else one scratch of
    `CPU_SCRATCH_BYTES` or `DEVICE_SCRATCH_BYTES`, whatever the tensors' sizes.
    """
    if not averages or (isinstance(weight, float) and weight == 0):
        return
    if isinstance(weight, float) and weight == 1:
        torch._foreach_copy_(averages, values)
        return
    if isinstance(weight, float) and finite and averages[0].dtype == values[0].dtype:
        torch._foreach_lerp_(averages, values, weight)
        return
    limit = _scratch_bytes(averages[0])
    if isinstance(weight, float) and finite:
        for targets, sources in chunks(averages, values, limit=limit):
            torch._foreach_lerp_(targets, _converted(sources, targets), weight)
        return
    if isinstance(weight, Tensor):
        weight = weight.to(averages[0].device)
    for targets, sources in chunks(averages, values, limit=limit // 8):
        _lerp_carefully_(targets, _converted(sources, targets), weight)


def follow_(
    tracks: Sequence[list[Tensor]], values: list[Tensor], weights: Sequence[float | Tensor], *, finite: bool = True
) -> None:
    """Move the averages of several tracks towards the same values, as `lerp_` does each.

    Memory: as `lerp_`.
    """
    for averages, weight in zip(tracks, weights, strict=True):
        lerp_(averages, values, weight, finite=finite)


def _converted(sources: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
    scratch = [torch.empty_like(target) for target in targets]
    torch._foreach_copy_(scratch, sources)
    return scratch


def _lerp_carefully_(targets: list[Tensor], values: list[Tensor], weight: float | Tensor) -> None:
    """As one flat tensor, in a few launches however many there are; exact for weights of 0 and 1."""
    average = torch.cat([target.reshape(-1) for target in targets])
    value = torch.cat([value.reshape(-1) for value in values])
    if isinstance(weight, Tensor):
        moved = average + (value - average) * weight
        moved = torch.where(moved.isfinite() & (weight < 1), moved, value)
        moved = torch.where(weight > 0, moved, average)
    else:
        moved = torch.lerp(average, value, weight)
        moved = torch.where(moved.isfinite(), moved, value)
    pieces = moved.split([target.numel() for target in targets])
    torch._foreach_copy_(targets, [piece.view_as(target) for piece, target in zip(pieces, targets, strict=True)])


@torch.no_grad()
def exchange_(lists: list[tuple[list[Tensor], list[Tensor]]]) -> None:
    """Let the contents of each pair change places, to the bit; ``lists`` as `paired` makes them.

    Memory: one scratch of `CPU_SCRATCH_BYTES` or `DEVICE_SCRATCH_BYTES` per device, taken before anything changes.
    """
    most: dict[torch.device, Tensor] = {}
    for left, _ in lists:
        scratch = make_scratch(left).view(torch.uint8)
        if scratch.nbytes > most.get(scratch.device, scratch[:0]).nbytes:
            most[scratch.device] = scratch
    for left, right in lists:
        size = left[0].element_size()
        room = most.get(left[0].device, left[0].new_empty(0).view(torch.uint8))
        scratch = room[: room.nbytes // size * size].view(left[0].dtype)
        for ours, theirs in chunks(left, right, limit=scratch.nbytes):
            kept = views(scratch, ours)
            torch._foreach_copy_(kept, ours)
            torch._foreach_copy_(ours, theirs)
            torch._foreach_copy_(theirs, kept)


def make_scratch(tensors: list[Tensor]) -> Tensor:
    """A flat tensor of their dtype on their device that holds all of them, or as many as one scratch may."""
    first = tensors[0]
    needed = sum(tensor.numel() for tensor in tensors)
    return torch.empty(
        min(needed, _scratch_bytes(first) // first.element_size()), dtype=first.dtype, device=first.device
    )


def views(scratch: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Consecutive pieces of ``scratch`` in the shapes of ``tensors``."""
    sizes = [tensor.numel() for tensor in tensors]
    return [piece.view(tensor.shape) for piece, tensor in zip(scratch[: sum(sizes)].split(sizes), tensors, strict=True)]


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """A 0-d int64 tensor on the same device that two tensors of equal bytes share. Memory: a constant scratch."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    limit = tensor.element_size() * _scratch_bytes(tensor) // 32  # each element takes three times eight bytes here
    for (pieces,) in chunks([tensor], limit=limit):
        for piece in pieces:
            bits = piece.view(as_integers).reshape(-1).long()
            # Places count by odd numbers, so that no bit is multiplied away.
            places = torch.arange(1, 2 * bits.numel(), 2, device=tensor.device)
            total = total * 31 + (bits * places).sum()
    return total


def _scratch_bytes(tensor: Tensor) -> int:
    return CPU_SCRATCH_BYTES if tensor.device.type == "cpu" else DEVICE_SCRATCH_BYTES


def paired(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The pairs as lists that one call takes: of one device, and of one dtype on either side."""
    return [(left, right) for left, right in grouped(pairs)]


def grouped(rows: Iterable[Sequence[Tensor]]) -> list[list[list[Tensor]]]:
    """The columns of a table of tensors as lists that one call takes: of one device, and each of one dtype."""
    groups: dict[object, list[list[Tensor]]] = {}
    for row in rows:
        columns = groups.setdefault((row[0].device, *(it.dtype for it in row)), [[] for _ in row])
        for column, tensor in zip(columns, row, strict=True):
            column.append(tensor)
    return list(groups.values())


def chunks(*lists: list[Tensor], limit: int) -> Iterator[tuple[list[Tensor], ...]]:
    """The same tensors in runs of at most ``limit`` bytes, counted in the first list; large ones are cut into views."""
    batch = _empty(len(lists))
    filled = 0
    for row in zip(*lists, strict=True):
        for pieces in _cut(row, limit):
            size = pieces[0].numel() * pieces[0].element_size()
            if filled and filled + size > limit:
                yield batch
                batch, filled = _empty(len(lists)), 0
            for column, piece in zip(batch, pieces, strict=True):
                column.append(piece)
            filled += size
    if filled:
        yield batch


def _empty(count: int) -> tuple[list[Tensor], ...]:
    return tuple([] for _ in range(count))


def _cut(row: tuple[Tensor, ...], limit: int) -> Iterator[tuple[Tensor, ...]]:
    """One tensor of each list, along the longest dimension until a piece fits into ``limit`` bytes."""
    first = row[0]
    size = first.numel() * first.element_size()
    if size <= limit or first.numel() == 1:
        yield row
        return
    dim = max(range(first.dim()), key=first.size)
    per_piece = max(1, first.size(dim) * limit // size)
    for pieces in zip(*(tensor.split(per_piece, dim) for tensor in row), strict=True):
        yield from _cut(pieces, limit)
