"""bfloat16 averages that move by less than they can hold: each step is rounded up or down by chance, unbiased."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ema_dist.kernels.lerp import Update, Weight, move_
from ema_dist.kernels.lists import flat_chunks
from ema_dist.kernels.random_bits import folded, key, mix_, signed
from ema_dist.kernels.rounding import ByChance, Place
from ema_dist.kernels.scratch import chunk_elements, views


class Stochastic:
    """Moves bfloat16 tracks in float32 and rounds them `ByChance`, chunk by chunk.

    It keeps views of the tensors it is made for: make another one when they move to other storage.

    Args:
        tracks: the averages of each track, bfloat16, in the order of ``values``.
        values: the live weights, of one dtype, on the averages' device.
        rounding: the places and the seed.
        finite: False where infinities may occur; see `lerp_`.

    Memory: one scratch, kept as long as this, and an int32 for each of its elements.
    """

    name = "scratch"

    def __init__(
        self, tracks: Sequence[list[Tensor]], values: list[Tensor], rounding: ByChance, *, finite: bool = True
    ) -> None:
        self._finite = finite
        self._seed = rounding.seed
        self._chunks = list(_chunked(tracks, values, rounding.places)) if tracks and values else []

    @torch.no_grad()
    def __call__(self, weights: Sequence[Weight], update: Update = 0) -> None:
        """Move each track by its weight; ``update`` is the number of this update."""
        if not self._chunks:
            return
        device = self._chunks[0].noise.device
        found = [key(self._seed, update=update, track=number) for number in range(len(weights))]
        keys = [it.to(device, non_blocking=True) if isinstance(it, Tensor) else it for it in found]
        for chunk in self._chunks:
            torch._foreach_copy_(chunk.room, chunk.values)
            for averages, weight, its in zip(chunk.tracks, weights, keys, strict=True):
                torch._foreach_copy_(chunk.wide_pieces, averages)
                move_(chunk.wide_pieces, chunk.room, weight, finite=self._finite)
                _round_(chunk, its)
                torch._foreach_copy_(averages, chunk.wide_pieces)


class _Chunk(NamedTuple):
    values: list[Tensor]
    tracks: list[list[Tensor]]
    room: list[Tensor]
    """Where the values are in float32."""
    wide: Tensor
    """Where a track is in float32."""
    wide_pieces: list[Tensor]
    noise: Tensor
    spare: Tensor
    elements: Tensor
    """0, 1, 2 ..."""
    tensors: Tensor
    """Which one each piece is of."""
    shifts: Tensor
    """The place of each piece's first element, less the one it has in the chunk."""
    sizes: Tensor


def _round_(chunk: _Chunk, key: int | Tensor) -> None:
    """Make each element of ``wide`` one that bfloat16 has."""
    keys = torch.bitwise_xor(chunk.tensors, key)
    keys = mix_(keys, torch.empty_like(keys)).add_(chunk.shifts)
    if len(keys) > 1:
        keys = keys.repeat_interleave(chunk.sizes, output_size=chunk.noise.numel())
    noise = mix_(torch.add(chunk.elements, keys, out=chunk.noise), chunk.spare).bitwise_and_(0xFFFF)
    # Another NaN could become an infinity, or a number: its bits would run over.
    chunk.wide.masked_fill_(chunk.wide.isnan(), torch.nan)
    chunk.wide.view(torch.int32).add_(noise).bitwise_and_(-0x10000)


def _chunked(tracks: Sequence[list[Tensor]], values: list[Tensor], places: Sequence[Place]) -> Iterator[_Chunk]:
    device = values[0].device
    elements = chunk_elements(values, itemsize=4 * torch.float32.itemsize)
    value, wide, noise, spare = torch.empty(4, elements, dtype=torch.float32, device=device)
    counted = torch.arange(elements, dtype=torch.int32, device=device)
    offsets = [0, *accumulate(value.numel() for value in values)]
    begin = 0
    for followed, *moved in flat_chunks(values, *tracks, elements=elements):
        sizes = [piece.numel() for piece in followed]
        *starts, end = accumulate(sizes, initial=begin)
        which = [bisect_right(offsets, start, hi=len(values)) - 1 for start in starts]
        first = [places[tensor].first + start - offsets[tensor] for tensor, start in zip(which, starts, strict=True)]
        shifts = [signed(place + begin - start) for place, start in zip(first, starts, strict=True)]
        total = end - begin
        yield _Chunk(
            followed,
            moved,
            room=views(value, followed),
            wide_pieces=views(wide, followed),
            wide=wide[:total],
            noise=noise[:total].view(torch.int32),
            spare=spare[:total].view(torch.int32),
            elements=counted[:total],
            tensors=_int32([signed(folded(places[tensor].tensor)) for tensor in which], device),
            shifts=_int32(shifts, device),
            sizes=torch.tensor(sizes, device=device),
        )
        begin = end


def _int32(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)
