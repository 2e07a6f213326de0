"""bfloat16 averages that move by less than they can hold: each step is rounded up or down by chance, unbiased."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ema_dist.kernels.kernel import UpdateIndex, Weight
from ema_dist.kernels.lerp_equation import lerp_uniform_
from ema_dist.kernels.lists import flat_chunks
from ema_dist.kernels.random_bits import hash_int, mix32_, to_int32, track_key
from ema_dist.kernels.rounding import StochasticRounding, TensorOffset
from ema_dist.kernels.scratch import chunk_elements, scratch_views


class StochasticKernel:
    """Moves bfloat16 tracks in float32 and rounds them `StochasticRounding`, chunk by chunk.

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
        self, tracks: Sequence[list[Tensor]], values: list[Tensor], rounding: StochasticRounding, *, finite: bool = True
    ) -> None:
        self._finite = finite
        self._seed = rounding.seed
        self._chunks = list(_make_chunks(tracks, values, rounding.tensor_offsets)) if tracks and values else []

    @torch.no_grad()
    def __call__(self, weights: Sequence[Weight], update_index: UpdateIndex = 0) -> None:
        """Move each track by its weight; ``update_index`` is the number of this update."""
        if not self._chunks:
            return
        device = self._chunks[0].noise.device
        host_keys = [track_key(self._seed, update_index=update_index, track=number) for number in range(len(weights))]
        keys = [
            round_key.to(device, non_blocking=True) if isinstance(round_key, Tensor) else round_key
            for round_key in host_keys
        ]
        for chunk in self._chunks:
            torch._foreach_copy_(chunk.wide_values, chunk.values)
            for averages, weight, round_key in zip(chunk.tracks, weights, keys, strict=True):
                torch._foreach_copy_(chunk.wide_pieces, averages)
                lerp_uniform_(chunk.wide_pieces, chunk.wide_values, weight, finite=self._finite)
                _round_(chunk, round_key)
                torch._foreach_copy_(averages, chunk.wide_pieces)


class _Chunk(NamedTuple):
    values: list[Tensor]
    tracks: list[list[Tensor]]
    wide_values: list[Tensor]
    """Where the values are in float32."""
    wide: Tensor
    """Where a track is in float32."""
    wide_pieces: list[Tensor]
    noise: Tensor
    spare: Tensor
    elements: Tensor
    """0, 1, 2 ..."""
    tensor_hashes: Tensor
    """Which one each piece is of."""
    counter_shifts: Tensor
    """The place of each piece's first element, less the one it has in the chunk."""
    sizes: Tensor


def _round_(chunk: _Chunk, track_key: int | Tensor) -> None:
    """Make each element of ``wide`` one that bfloat16 has."""
    keys = torch.bitwise_xor(chunk.tensor_hashes, track_key)
    keys = mix32_(keys, torch.empty_like(keys)).add_(chunk.counter_shifts)
    if len(keys) > 1:
        keys = keys.repeat_interleave(chunk.sizes, output_size=chunk.noise.numel())
    noise = mix32_(torch.add(chunk.elements, keys, out=chunk.noise), chunk.spare).bitwise_and_(0xFFFF)
    # Another NaN could become an infinity, or a number: its bits would run over.
    chunk.wide.masked_fill_(chunk.wide.isnan(), torch.nan)
    chunk.wide.view(torch.int32).add_(noise).bitwise_and_(-0x10000)


def _make_chunks(
    tracks: Sequence[list[Tensor]], values: list[Tensor], tensor_offsets: Sequence[TensorOffset]
) -> Iterator[_Chunk]:
    device = values[0].device
    elements = chunk_elements(values, itemsize=4 * torch.float32.itemsize)
    value, wide, noise, spare = torch.empty(4, elements, dtype=torch.float32, device=device)
    indices = torch.arange(elements, dtype=torch.int32, device=device)
    tensor_starts = [0, *accumulate(value.numel() for value in values)]
    begin = 0
    for live_pieces, *track_pieces in flat_chunks(values, *tracks, elements=elements):
        sizes = [piece.numel() for piece in live_pieces]
        *starts, end = accumulate(sizes, initial=begin)
        tensor_indices = [bisect_right(tensor_starts, start, hi=len(values)) - 1 for start in starts]
        offset = [
            tensor_offsets[tensor].offset + start - tensor_starts[tensor]
            for tensor, start in zip(tensor_indices, starts, strict=True)
        ]
        counter_shifts = [
            to_int32(global_offset + begin - start) for global_offset, start in zip(offset, starts, strict=True)
        ]
        total = end - begin
        yield _Chunk(
            live_pieces,
            track_pieces,
            wide_values=scratch_views(value, live_pieces),
            wide_pieces=scratch_views(wide, live_pieces),
            wide=wide[:total],
            noise=noise[:total].view(torch.int32),
            spare=spare[:total].view(torch.int32),
            elements=indices[:total],
            tensor_hashes=_int32(
                [to_int32(hash_int(tensor_offsets[tensor].tensor_id)) for tensor in tensor_indices], device
            ),
            counter_shifts=_int32(counter_shifts, device),
            sizes=torch.tensor(sizes, device=device),
        )
        begin = end


def _int32(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)
