"""Random bits that depend only on a seed, the update, the track, the tensor and the element.

Element ``i`` of the full tensor with the hash ``t`` gets ``mix32(i + mix32(t ^ key))``, where `track_key` gives one key
for each track and update. All devices and all chunks get the same bits, and there is no state to save.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ema_dist.kernels.kernel import UpdateIndex
from ema_dist.kernels.rounding import StochasticRounding

# The constants of lowbias32, a hash with two multiplications and a low bias.
SHIFTS = (16, 15, 16)
FACTORS = (0x7FEB352D, 0x846CA68B)


def mix32(number: int) -> int:
    """A permutation of the 32-bit numbers in which each bit of the result depends on all bits of ``number``.

    Source: C. Wellons, "Prospecting for hash functions" (2018), ``lowbias32``.
    """
    number &= 0xFFFFFFFF
    for shift, factor in zip(SHIFTS, (*FACTORS, 1), strict=True):
        number = (number ^ (number >> shift)) * factor & 0xFFFFFFFF
    return number


def track_key(seed: int, *, update_index: UpdateIndex, track: int) -> int | Tensor:
    """The key of one track at one update: an int32, or an int32 tensor if ``update_index`` is a tensor."""
    seed_hash = to_int32(mix32(hash_int(seed) + track))
    if not isinstance(update_index, Tensor):
        return to_int32(mix32(update_index + seed_hash))
    bits = (update_index + seed_hash).int()
    return mix32_(bits, torch.empty_like(bits))


def mix32_(bits: Tensor, spare: Tensor) -> Tensor:
    """`mix32` of each element of ``bits``, in place. ``spare`` is overwritten; both are int32 of one shape."""
    for shift, factor in zip(SHIFTS, (*FACTORS, 1), strict=True):
        # A right shift of a negative number shifts ones in; the mask makes it a shift of an unsigned number.
        torch.bitwise_right_shift(bits, shift, out=spare).bitwise_and_((1 << (32 - shift)) - 1)
        bits.bitwise_xor_(spare)
        if factor != 1:
            bits.mul_(to_int32(factor))
    return bits


def to_int32(number: int) -> int:
    """The int32 with the same bits as ``number`` modulo 2**32."""
    return (number + 2**31) % 2**32 - 2**31


def hash_int(number: int) -> int:
    """32 bits that depend on all bits of ``number``, which is not negative."""
    hashed = 0
    while number:
        hashed = mix32(hashed ^ number)
        number >>= 32
    return hashed


class NoiseTables(NamedTuple):
    """Int32 tables for kernels that compute the bits: a `track_key` is ``mix32(update_index + track_seeds[track])``."""

    tensor_hashes: Tensor
    """The hash of each tensor's id: ``t`` in ``mix32(t ^ key)``."""
    global_offsets: Tensor
    """The offset of each tensor's first element in the full tensor."""
    track_seeds: Tensor
    """The hash of the seed and each track."""


def make_noise_tables(rounding: StochasticRounding, *, tracks: int, device: torch.device) -> NoiseTables:
    """Tables for the tensors of ``rounding`` and the number of ``tracks``."""
    tensor_hashes = [hash_int(tensor_offset.tensor_id) for tensor_offset in rounding.tensor_offsets]
    global_offsets = [tensor_offset.offset for tensor_offset in rounding.tensor_offsets]
    track_seeds = [mix32(hash_int(rounding.seed) + track) for track in range(tracks)]
    columns = ([to_int32(number) for number in column] for column in (tensor_hashes, global_offsets, track_seeds))
    return NoiseTables(*(torch.tensor(column, dtype=torch.int32, device=device) for column in columns))
