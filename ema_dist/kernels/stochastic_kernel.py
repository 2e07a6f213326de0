"""Updates bfloat16 averages with stochastic rounding: they stay unbiased, even if updates are below their precision."""

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
from ema_dist.kernels.write_log import WriteLog


class StochasticKernel:
    """Lerps bfloat16 tracks in float32, chunk by chunk, and rounds the results as `StochasticRounding` says.

    It keeps views of the tensors: make another kernel when they get other storage.

    Args:
        tracks: the bfloat16 averages of each track, in the order of ``values``.
        values: the live weights, of one dtype, on the averages' device.
        rounding: the offset of each tensor, and the seed.
        finite: False where infinities may occur; see `lerp_`.

    Memory: one scratch and an int32 for each of its elements; the kernel keeps them.
    """

    name = "scratch"

    def __init__(
        self, tracks: Sequence[list[Tensor]], values: list[Tensor], rounding: StochasticRounding, *, finite: bool = True
    ) -> None:
        self._finite = finite
        self._seed = rounding.seed
        self._chunks = list(_make_chunks(tracks, values, rounding.tensor_offsets)) if tracks and values else []

    @torch.no_grad()
    def __call__(
        self, weights: Sequence[Weight], update_index: UpdateIndex = 0, write_log: WriteLog | None = None
    ) -> None:
        """Lerp each track by its weight; ``update_index`` is the number of this update."""
        if not self._chunks:
            return
        write_log = write_log or WriteLog()
        device = self._chunks[0].noise.device
        host_keys = [track_key(self._seed, update_index=update_index, track=track) for track in range(len(weights))]
        keys = [key.to(device, non_blocking=True) if isinstance(key, Tensor) else key for key in host_keys]
        for chunk in self._chunks:
            torch._foreach_copy_(chunk.wide_values, chunk.values)
            for averages, weight, key in zip(chunk.tracks, weights, keys, strict=True):
                torch._foreach_copy_(chunk.wide_pieces, averages)
                lerp_uniform_(chunk.wide_pieces, chunk.wide_values, weight, finite=self._finite)
                _round_(chunk, key)
                write_log.write(torch._foreach_copy_, averages, chunk.wide_pieces)


class _Chunk(NamedTuple):
    values: list[Tensor]
    tracks: list[list[Tensor]]
    wide_values: list[Tensor]
    """Scratch for the values in float32."""
    wide: Tensor
    """Scratch for one track in float32, flat; `wide_pieces` are views of it in the shapes of the values."""
    wide_pieces: list[Tensor]
    noise: Tensor
    spare: Tensor
    element_indices: Tensor
    """0, 1, 2 ..."""
    tensor_hashes: Tensor
    """The hash of each piece's tensor."""
    counter_shifts: Tensor
    """For each piece, the number to add to an index in the chunk to get the index in the full tensor."""
    sizes: Tensor
    """The number of elements of each piece."""


def _round_(chunk: _Chunk, track_key: int | Tensor) -> None:
    """Round each element of ``wide`` to a bfloat16 number."""
    keys = torch.bitwise_xor(chunk.tensor_hashes, track_key)
    keys = mix32_(keys, torch.empty_like(keys)).add_(chunk.counter_shifts)
    if len(keys) > 1:
        keys = keys.repeat_interleave(chunk.sizes, output_size=chunk.noise.numel())
    noise = mix32_(torch.add(chunk.element_indices, keys, out=chunk.noise), chunk.spare).bitwise_and_(0xFFFF)
    # Every NaN becomes the same one: noise added to the bits of other NaNs could overflow into an infinity or a number.
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
        global_offsets = [
            tensor_offsets[tensor].offset + start - tensor_starts[tensor]
            for tensor, start in zip(tensor_indices, starts, strict=True)
        ]
        counter_shifts = [
            to_int32(global_offset + begin - start) for global_offset, start in zip(global_offsets, starts, strict=True)
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
            element_indices=indices[:total],
            tensor_hashes=_int32(
                [to_int32(hash_int(tensor_offsets[tensor].tensor_id)) for tensor in tensor_indices], device
            ),
            counter_shifts=_int32(counter_shifts, device),
            sizes=torch.tensor(sizes, device=device),
        )
        begin = end


def _int32(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)
