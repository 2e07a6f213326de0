"""What Triton compiles. Importing this imports Triton, so only `InOneLaunch` does, and late."""

from __future__ import annotations

import triton
import triton.language as tl

NEAREST = tl.constexpr(0)
CHANCE = tl.constexpr(1)
REMAINDERS = tl.constexpr(2)


@triton.jit
def follow(  # noqa: PLR0913, PLR0917 - a kernel takes what it reads
    value_addresses: tl.tensor,
    average_addresses: tl.tensor,
    sizes: tl.tensor,
    block_tensors: tl.tensor,
    block_starts: tl.tensor,
    names: tl.tensor,
    firsts: tl.tensor,
    seeds: tl.tensor,
    weights: tl.tensor,
    update: tl.tensor,
    tensors: tl.tensor,
    live: tl.constexpr,
    stored: tl.constexpr,
    wide: tl.constexpr,
    tracks: tl.constexpr,
    finite: tl.constexpr,
    rounding: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Move one block of one tensor by all tracks; the tables say which one.

    Args:
        value_addresses: see `Tables`, and for the next four.
        average_addresses: also of remainders.
        sizes: of tensors.
        block_tensors: of blocks.
        block_starts: of blocks.
        names: see `NoiseTables`, and for the next two; read for rounding by chance only.
        firsts: of tensors.
        seeds: of tracks.
        weights: of tracks, in float64.
        update: its number.
        tensors: how many there are.
        live: dtype of the values.
        stored: dtype of the averages; uint16 for the bits of those that are rounded.
        wide: dtype in which they move.
        tracks: how many there are.
        finite: False where infinities may occur.
        rounding: NEAREST, CHANCE or REMAINDERS.
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
            inside = places < size
            value = _load(_pointers(value_addresses + tensor, places, live, aligned), inside, masked).to(wide)
            for track in tl.static_range(tracks):
                weight = tl.load(weights + track).to(wide)
                if weight > 0:
                    pointers = _pointers(average_addresses + track * tensors + tensor, places, stored, aligned)
                    average = _load(pointers, inside, masked)
                    if rounding == NEAREST:
                        moved = _moved(average.to(wide), value, weight, finite)
                        _store(pointers, moved.to(stored), inside, masked)
                    elif rounding == CHANCE:
                        moved = _moved(_joined(average, 0), value, weight, finite)
                        key = _mixed(_unsigned(tl.load(update)) + _unsigned(tl.load(seeds + track)))
                        key = _mixed(_unsigned(tl.load(names + tensor)) ^ key) + _unsigned(tl.load(firsts + tensor))
                        noise = _mixed(places.to(tl.uint32) + key) & 0xFFFF
                        _store(pointers, ((_bits(moved) + noise) >> 16).to(tl.uint16), inside, masked)
                    else:
                        lows = average_addresses + (tracks + track) * tensors + tensor
                        low_pointers = _pointers(lows, places, tl.int16, aligned)
                        low = _load(low_pointers, inside, masked)
                        bits = _bits(_moved(_joined(average, low), value, weight, finite))
                        _store(pointers, ((bits + 0x8000) >> 16).to(tl.uint16), inside, masked)
                        _store(low_pointers, bits.to(tl.uint16).to(tl.int16, bitcast=True), inside, masked)


@triton.jit
def _joined(high: tl.tensor, low: tl.tensor) -> tl.tensor:
    """float32 of its upper half's bits and what is missing."""
    return ((high.to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)


@triton.jit
def _bits(wide: tl.tensor) -> tl.tensor:
    """Of float32, with one NaN only: others would run over into infinities or numbers."""
    return tl.where(wide != wide, 0x7FC00000, wide.to(tl.uint32, bitcast=True))  # noqa: PLR0124 - true for NaN


@triton.jit
def _unsigned(number: tl.tensor) -> tl.tensor:
    return number.to(tl.uint32, bitcast=True)


@triton.jit
def _mixed(bits: tl.tensor) -> tl.tensor:
    """`mixed` of `noise`."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


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
