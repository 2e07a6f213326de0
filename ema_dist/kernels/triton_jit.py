"""The functions that Triton compiles. Only the constructor of `TritonKernel` imports this module: it imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

NEAREST = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
COMPENSATED = tl.constexpr(2)


@triton.jit
def lerp_tracks(  # noqa: PLR0913, PLR0917 - kernels take tensors and numbers only
    value_addresses: tl.tensor,
    average_addresses: tl.tensor,
    sizes: tl.tensor,
    block_tensors: tl.tensor,
    block_starts: tl.tensor,
    tensor_hashes: tl.tensor,
    global_offsets: tl.tensor,
    track_seeds: tl.tensor,
    weights: tl.tensor,
    update_index: tl.tensor,
    tensor_count: tl.tensor,
    live: tl.constexpr,
    stored: tl.constexpr,
    wide: tl.constexpr,
    track_count: tl.constexpr,
    finite: tl.constexpr,
    rounding: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
    piece: tl.constexpr,
) -> None:
    """Lerp one block of one tensor in all tracks; the tables give the tensor and the block.

    Args:
        value_addresses: see `AddressTables`, which has this table and the next four.
        average_addresses: the addresses of averages, then of residuals.
        sizes: the number of elements of each tensor.
        block_tensors: the index of each block's tensor.
        block_starts: the first element of each block.
        tensor_hashes: see `NoiseTables`, which has this table and the next two; only STOCHASTIC reads them.
        global_offsets: the offset of each tensor in the full tensor.
        track_seeds: the seed of each track.
        weights: the weight of each track, in float64.
        update_index: the number of the update.
        tensor_count: number of tensors.
        live: dtype of the values.
        stored: dtype of the averages; uint16, the bits of bfloat16, unless rounding is NEAREST.
        wide: dtype of the arithmetic.
        track_count: number of tracks.
        finite: False where infinities may occur.
        rounding: NEAREST, STOCHASTIC or COMPENSATED.
        aligned: whether all addresses are multiples of 16 bytes.
        block: elements of a block.
        piece: elements that are processed at a time; divides a block.
    """
    tl.static_assert(block % piece == 0, "pieces must not reach into the next block: they are not masked")
    block_index = tl.program_id(0)
    tensor = tl.load(block_tensors + block_index)
    start = tl.multiple_of(tl.load(block_starts + block_index), block)
    size = tl.load(sizes + tensor)
    # Without a mask a thread loads 16 bytes at a time; only the last block of a tensor needs a mask.
    is_full = start + block <= size
    # In pieces, because a whole block at once takes all registers of a thread, and few programs fit into a processor.
    for piece_start in range(0, block, piece):
        offsets = start + piece_start + tl.arange(0, piece)
        for masked in tl.static_range(2):
            if is_full != (masked == 1):
                mask = offsets < size
                value = _load(_pointers(value_addresses + tensor, offsets, live, aligned), mask, masked).to(wide)
                for track in tl.static_range(track_count):
                    weight = tl.load(weights + track).to(wide)
                    if weight > 0:
                        pointers = _pointers(
                            average_addresses + track * tensor_count + tensor, offsets, stored, aligned
                        )
                        average = _load(pointers, mask, masked)
                        if rounding == NEAREST:
                            result = _lerp(average.to(wide), value, weight, finite)
                            _store(pointers, result.to(stored), mask, masked)
                        elif rounding == STOCHASTIC:
                            result = _lerp(_recombine(average, 0), value, weight, finite)
                            key = _mix32(_to_uint32(tl.load(update_index)) + _to_uint32(tl.load(track_seeds + track)))
                            key = _mix32(_to_uint32(tl.load(tensor_hashes + tensor)) ^ key) + _to_uint32(
                                tl.load(global_offsets + tensor)
                            )
                            noise = _mix32(offsets.to(tl.uint32) + key) & 0xFFFF
                            _store(pointers, ((_float_bits(result) + noise) >> 16).to(tl.uint16), mask, masked)
                        else:
                            residual_addresses = average_addresses + (track_count + track) * tensor_count + tensor
                            low_pointers = _pointers(residual_addresses, offsets, tl.int16, aligned)
                            low = _load(low_pointers, mask, masked)
                            bits = _float_bits(_lerp(_recombine(average, low), value, weight, finite))
                            _store(pointers, ((bits + 0x8000) >> 16).to(tl.uint16), mask, masked)
                            _store(low_pointers, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask, masked)


@triton.jit
def _recombine(high: tl.tensor, low: tl.tensor) -> tl.tensor:
    """The float32 number of a bfloat16 number's bits and its residual."""
    return ((high.to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)


@triton.jit
def _float_bits(wide: tl.tensor) -> tl.tensor:
    """The bits of a float32 number; every NaN becomes the same one, as adding to the bits of others could overflow."""
    return tl.where(wide != wide, 0x7FC00000, wide.to(tl.uint32, bitcast=True))  # noqa: PLR0124 - true for NaN


@triton.jit
def _to_uint32(number: tl.tensor) -> tl.tensor:
    return number.to(tl.uint32, bitcast=True)


@triton.jit
def _mix32(bits: tl.tensor) -> tl.tensor:
    """`mix32` of random_bits.py."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _pointers(address: tl.tensor, offsets: tl.tensor, dtype: tl.constexpr, aligned: tl.constexpr) -> tl.tensor:
    pointer = tl.load(address).to(tl.pointer_type(dtype))  # pyrefly: ignore[bad-argument-type]
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + offsets


@triton.jit
def _load(pointers: tl.tensor, mask: tl.tensor, masked: tl.constexpr) -> tl.tensor:
    return tl.load(pointers, mask=mask, other=0) if masked else tl.load(pointers)


@triton.jit
def _store(pointers: tl.tensor, elements: tl.tensor, mask: tl.tensor, masked: tl.constexpr) -> None:
    if masked:
        tl.store(pointers, elements, mask=mask)
    else:
        tl.store(pointers, elements)


@triton.jit
def _lerp(average: tl.tensor, value: tl.tensor, weight: tl.tensor, finite: tl.constexpr) -> tl.tensor:
    """The formula of `torch.lerp`, which starts from the nearer end; exact if the weight is 1."""
    difference = value - average
    result = tl.where(weight < 0.5, average + weight * difference, value - difference * (1 - weight))
    result = tl.where(weight < 1, result, value)
    if not finite:
        result = tl.where(tl.abs(result) < float("inf"), result, value)
    return result


def is_interpreted() -> bool:
    """Whether Triton interprets its functions instead of compiling them, because of ``TRITON_INTERPRET=1``."""
    return not isinstance(lerp_tracks, triton.JITFunction)
