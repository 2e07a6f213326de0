"""Lerps chunk by chunk: all tracks process a chunk of live values before the next chunk is read from memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ema_dist.kernels.kernel import UpdateIndex, Weight
from ema_dist.kernels.lerp_equation import lerp_uniform_
from ema_dist.kernels.lists import flat_chunks, is_small
from ema_dist.kernels.scratch import chunk_elements, scratch_views
from ema_dist.kernels.write_log import WriteLog


class ScratchKernel:
    """Lerps tracks chunk by chunk; live values are first converted into a scratch if a track has another dtype.

    It keeps views of the tensors: make another kernel when they get other storage.

    Args:
        tracks: the averages of each track, in the order of ``values``; all tensors of one track have one dtype.
        values: the live weights, of one dtype, on the averages' device.
        finite: False where infinities may occur; see `lerp_`.

    Memory: a scratch for each dtype of tracks that is not the live dtype; the kernel keeps them.
    """

    name = "scratch"

    def __init__(self, tracks: Sequence[list[Tensor]], values: list[Tensor], *, finite: bool = True) -> None:
        self._finite = finite
        self._chunks = _make_chunks(tracks, values) if tracks and values else []

    @torch.no_grad()
    def __call__(
        self,
        weights: Sequence[Weight],
        update_index: UpdateIndex = 0,  # noqa: ARG002  as `Kernel`
        write_log: WriteLog | None = None,
    ) -> None:
        """Lerp each track by its weight."""
        for chunk in self._chunks:
            if chunk.packed is not None:
                torch.cat(chunk.values, out=chunk.packed)
            for converted, values in chunk.conversions:
                torch._foreach_copy_(converted, values)
            for averages, sources, weight in zip(chunk.tracks, chunk.sources, weights, strict=True):
                lerp_uniform_(averages, sources, weight, finite=self._finite, write_log=write_log)


class _Chunk(NamedTuple):
    values: list[Tensor]
    tracks: list[list[Tensor]]
    sources: list[list[Tensor]]
    """The tensors that each track is lerped towards: the values, or the scratch with the values in its dtype."""
    packed: Tensor | None
    """The scratch in which small values are concatenated first, as one large conversion is faster than many small."""
    conversions: list[tuple[list[Tensor], list[Tensor]]]
    """Targets and sources of the conversion to each dtype of tracks that is not the live dtype."""


def _make_chunks(tracks: Sequence[list[Tensor]], values: list[Tensor]) -> list[_Chunk]:
    live, device = values[0].dtype, values[0].device
    other_dtypes = dict.fromkeys(track[0].dtype for track in tracks if track[0].dtype != live)
    is_packing = bool(other_dtypes) and device.type == "cpu" and is_small(values)
    itemsize = max(track[0].dtype.itemsize for track in tracks) + (live.itemsize if is_packing else 0)
    elements = chunk_elements(values, itemsize=itemsize)
    scratches = {dtype: torch.empty(elements, dtype=dtype, device=device) for dtype in other_dtypes}
    pack_buffer = torch.empty(elements, dtype=live, device=device) if is_packing else None
    chunks = []
    for live_pieces, *track_pieces in flat_chunks(values, *tracks, elements=elements):
        converted = {dtype: scratch_views(scratch, live_pieces) for dtype, scratch in scratches.items()}
        sources = [converted.get(pieces[0].dtype, live_pieces) for pieces in track_pieces]
        packed = None
        conversions = [(targets, live_pieces) for targets in converted.values()]
        if pack_buffer is not None and is_small(live_pieces) and all(piece.dim() == 1 for piece in live_pieces):
            packed = pack_buffer[: sum(piece.numel() for piece in live_pieces)]
            conversions = [([scratch[: packed.numel()]], [packed]) for scratch in scratches.values()]
        chunks.append(_Chunk(live_pieces, track_pieces, sources, packed, conversions))
    return chunks
