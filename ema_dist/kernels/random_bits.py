"""Random bits that depend on a seed, the number of an update and a place, and on nothing else.

Element ``i`` of tensor ``t`` gets ``mixed(i + mixed(t ^ key))`` modulo 2**32, with one `track_key` for each track and update:
the same bits on every device and in every chunk, without a state that would have to be saved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ema_dist.kernels.kernel import UpdateIndex
from ema_dist.kernels.rounding import StochasticRounding

# The 32-bit permutation of least bias among those of two multiplications.
SHIFTS = (16, 15, 16)
FACTORS = (0x7FEB352D, 0x846CA68B)


def mix32(number: int) -> int:
    """A permutation of the 32-bit numbers in which each bit hangs on all bits.

    Source: C. Wellons, "Prospecting for hash functions" (2018), ``lowbias32``.
    """
    number &= 0xFFFFFFFF
    for shift, factor in zip(SHIFTS, (*FACTORS, 1), strict=True):
        number = (number ^ (number >> shift)) * factor & 0xFFFFFFFF
    return number


def track_key(seed: int, *, update_index: UpdateIndex, track: int) -> int | Tensor:
    """32 bits for all places of one track at one update: an int32, or a tensor of one where ``update_index`` is a tensor."""
    seed_hash = to_int32(mix32(hash_int(seed) + track))
    if not isinstance(update_index, Tensor):
        return to_int32(mix32(update_index + seed_hash))
    bits = (update_index + seed_hash).int()
    return mix32_(bits, torch.empty_like(bits))


def mix32_(bits: Tensor, spare: Tensor) -> Tensor:
    """`mix32` of each element, in place; both are int32 of one shape, and what ``spare`` holds is lost."""
    for shift, factor in zip(SHIFTS, (*FACTORS, 1), strict=True):
        # Shifting a signed number brings copies of its sign.
        torch.bitwise_right_shift(bits, shift, out=spare).bitwise_and_((1 << (32 - shift)) - 1)
        bits.bitwise_xor_(spare)
        if factor != 1:
            bits.mul_(to_int32(factor))
    return bits


def to_int32(number: int) -> int:
    """The int32 of the same bits as ``number`` modulo 2**32."""
    return (number + 2**31) % 2**32 - 2**31


def hash_int(number: int) -> int:
    """32 bits that hang on all of ``number``, which is not negative."""
    low = 0
    while number:
        low = mix32(low ^ number)
        number >>= 32
    return low


class NoiseTables(NamedTuple):
    """What a kernel reads to make the bits itself, int32: ``track_key`` is ``mixed(update + seeds[track])``."""

    tensor_hashes: Tensor
    """Of each tensor ``t``, as it enters ``mixed(t ^ key)``."""
    global_offsets: Tensor
    """The place of its first element."""
    track_seeds: Tensor
    """Of each track."""


def make_noise_tables(rounding: StochasticRounding, *, tracks: int, device: torch.device) -> NoiseTables:
    """Tables for these places and so many tracks."""
    tensor_hashes = [hash_int(tensor_offset.tensor_id) for tensor_offset in rounding.tensor_offsets]
    global_offsets = [tensor_offset.offset for tensor_offset in rounding.tensor_offsets]
    track_seeds = [mix32(hash_int(rounding.seed) + track) for track in range(tracks)]
    columns = ([to_int32(number) for number in column] for column in (tensor_hashes, global_offsets, track_seeds))
    return NoiseTables(*(torch.tensor(column, dtype=torch.int32, device=device) for column in columns))
