"""Random bits that depend on a seed, the number of an update and a place, and on nothing else.

Element ``i`` of tensor ``t`` gets ``mixed(i + mixed(t ^ key))`` modulo 2**32, with one `key` for each track and update:
the same bits on every device and in every chunk, without a state that would have to be saved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ema_dist.kernels.lerp import Update
from ema_dist.kernels.rounding import ByChance

# The 32-bit permutation of least bias among those of two multiplications.
SHIFTS = (16, 15, 16)
FACTORS = (0x7FEB352D, 0x846CA68B)


def mixed(number: int) -> int:
    """A permutation of the 32-bit numbers in which each bit hangs on all bits.

    Source: C. Wellons, "Prospecting for hash functions" (2018), ``lowbias32``.
    """
    number &= 0xFFFFFFFF
    for shift, factor in zip(SHIFTS, (*FACTORS, 1), strict=True):
        number = (number ^ (number >> shift)) * factor & 0xFFFFFFFF
    return number


def key(seed: int, *, update: Update, track: int) -> int | Tensor:
    """32 bits for all places of one track at one update: an int32, or a tensor of one where ``update`` is a tensor."""
    first = signed(mixed(folded(seed) + track))
    if not isinstance(update, Tensor):
        return signed(mixed(update + first))
    bits = (update + first).int()
    return mix_(bits, torch.empty_like(bits))


def mix_(bits: Tensor, spare: Tensor) -> Tensor:
    """`mixed` of each element, in place; both are int32 of one shape, and what ``spare`` holds is lost."""
    for shift, factor in zip(SHIFTS, (*FACTORS, 1), strict=True):
        # Shifting a signed number brings copies of its sign.
        torch.bitwise_right_shift(bits, shift, out=spare).bitwise_and_((1 << (32 - shift)) - 1)
        bits.bitwise_xor_(spare)
        if factor != 1:
            bits.mul_(signed(factor))
    return bits


def signed(number: int) -> int:
    """The int32 of the same bits as ``number`` modulo 2**32."""
    return (number + 2**31) % 2**32 - 2**31


def folded(number: int) -> int:
    """32 bits that hang on all of ``number``, which is not negative."""
    low = 0
    while number:
        low = mixed(low ^ number)
        number >>= 32
    return low


class NoiseTables(NamedTuple):
    """What a kernel reads to make the bits itself, int32: ``key`` is ``mixed(update + seeds[track])``."""

    names: Tensor
    """Of each tensor ``t``, as it enters ``mixed(t ^ key)``."""
    firsts: Tensor
    """The place of its first element."""
    seeds: Tensor
    """Of each track."""


def noise_tables(rounding: ByChance, *, tracks: int, device: torch.device) -> NoiseTables:
    """Tables for these places and so many tracks."""
    names = [folded(place.tensor) for place in rounding.places]
    firsts = [place.first for place in rounding.places]
    seeds = [mixed(folded(rounding.seed) + track) for track in range(tracks)]
    columns = ([signed(number) for number in column] for column in (names, firsts, seeds))
    return NoiseTables(*(torch.tensor(column, dtype=torch.int32, device=device) for column in columns))
