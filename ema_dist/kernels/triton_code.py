"""What Triton compiles. Importing this imports Triton, so only `InOneLaunch` does, and late."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def follow(  # noqa: PLR0913, PLR0917 - a kernel takes what it reads
    value_addresses: tl.tensor,
    average_addresses: tl.tensor,
    sizes: tl.tensor,
    block_tensors: tl.tensor,
    block_starts: tl.tensor,
    weights: tl.tensor,
    tensors: tl.tensor,
    live: tl.constexpr,
    stored: tl.constexpr,
    wide: tl.constexpr,
    tracks: tl.constexpr,
    finite: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Move one block of one tensor by all tracks; the tables say which one.

    Args:
        value_addresses: of each tensor's live values, as int64.
        average_addresses: of each track's averages of each tensor, one track after the other, as int64.
        sizes: of each tensor, in elements.
        block_tensors: the tensor of each block.
        block_starts: the first element of each block.
        weights: of each track, in float64.
        tensors: how many there are.
        live: dtype of the values.
        stored: dtype of the averages.
        wide: dtype in which they move.
        tracks: how many there are.
        finite: False where infinities may occur.
        aligned: whether all addresses are multiples of 16 bytes.
        block: how many elements it takes.
    """
    number = tl.program_id(0)
    tensor = tl.load(block_tensors + number)
    start = tl.multiple_of(tl.load(block_starts + number), block)
    size = tl.load(sizes + tensor)
    places = start + tl.arange(0, block)
    # Without a mask a thread takes 16 bytes at a time: only the last block of a tensor needs one.
    is_full = start + block <= size
    for masked in tl.static_range(2):
        if is_full != (masked == 1):
            value = _load(_pointers(value_addresses + tensor, places, live, aligned), places < size, masked)
            value = value.to(wide)
            for track in tl.static_range(tracks):
                weight = tl.load(weights + track).to(wide)
                if weight > 0:
                    pointers = _pointers(average_addresses + track * tensors + tensor, places, stored, aligned)
                    average = _load(pointers, places < size, masked).to(wide)
                    moved = _moved(average, value, weight, finite).to(stored)
                    _store(pointers, moved, places < size, masked)


@triton.jit
def _pointers(address: tl.tensor, places: tl.tensor, dtype: tl.constexpr, aligned: tl.constexpr) -> tl.tensor:
    pointer = tl.load(address).to(tl.pointer_type(dtype))  # pyrefly: ignore[bad-argument-type]
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + places


@triton.jit
def _load(pointers: tl.tensor, inside: tl.tensor, masked: tl.constexpr) -> tl.tensor:
    return tl.load(pointers, mask=inside, other=0) if masked else tl.load(pointers)


@triton.jit
def _store(pointers: tl.tensor, elements: tl.tensor, inside: tl.tensor, masked: tl.constexpr) -> None:
    if masked:
        tl.store(pointers, elements, mask=inside)
    else:
        tl.store(pointers, elements)


@triton.jit
def _moved(average: tl.tensor, value: tl.tensor, weight: tl.tensor, finite: tl.constexpr) -> tl.tensor:
    """As `torch.lerp` has it, whose steps are the same towards either end; exact at the live one."""
    difference = value - average
    moved = tl.where(weight < 0.5, average + weight * difference, value - difference * (1 - weight))
    moved = tl.where(weight < 1, moved, value)
    if not finite:
        moved = tl.where(tl.abs(moved) < float("inf"), moved, value)
    return moved


def is_interpreted() -> bool:
    """Whether Python runs what Triton would compile, as ``TRITON_INTERPRET=1`` asks for."""
    return not isinstance(follow, triton.JITFunction)
