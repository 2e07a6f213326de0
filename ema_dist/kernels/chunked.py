"""All tracks move by one chunk of the live values before any moves by the next: memory is asked for each chunk once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ema_dist.kernels.lerp import Update, Weight, move_
from ema_dist.kernels.lists import flat_chunks, is_small
from ema_dist.kernels.scratch import chunk_elements, views


class InChunks:
    """Moves tracks chunk by chunk, through a scratch in the averages' dtype where that is not the live one.

    It keeps views of the tensors it is made for: make another one when they move to other storage.

    Args:
        tracks: the averages of each track, in the order of ``values``; all tensors of one track have one dtype.
        values: the live weights, of one dtype, on the averages' device.
        finite: False where infinities may occur; see `lerp_`.

    Memory: a scratch for each dtype among the tracks that is not the live one, kept as long as this.
    """

    name = "scratch"

    def __init__(self, tracks: Sequence[list[Tensor]], values: list[Tensor], *, finite: bool = True) -> None:
        self._finite = finite
        self._chunks = _chunked(tracks, values) if tracks and values else []

    @torch.no_grad()
    def __call__(self, weights: Sequence[Weight], update: Update = 0) -> None:  # noqa: ARG002
        """Move each track by its weight."""
        for chunk in self._chunks:
            if chunk.packed is not None:
                torch.cat(chunk.values, out=chunk.packed)
            for rooms, values in chunk.conversions:
                torch._foreach_copy_(rooms, values)
            for averages, sources, weight in zip(chunk.tracks, chunk.sources, weights, strict=True):
                move_(averages, sources, weight, finite=self._finite)


class _Chunk(NamedTuple):
    values: list[Tensor]
    tracks: list[list[Tensor]]
    sources: list[list[Tensor]]
    """What each track follows: the values, or where they are converted to its dtype."""
    packed: Tensor | None
    """Where small values are put together first: to convert each by itself takes longer."""
    conversions: list[tuple[list[Tensor], list[Tensor]]]
    """What is filled, and from what: one for each dtype."""


def _chunked(tracks: Sequence[list[Tensor]], values: list[Tensor]) -> list[_Chunk]:
    live, device = values[0].dtype, values[0].device
    others = dict.fromkeys(track[0].dtype for track in tracks if track[0].dtype != live)
    packs = bool(others) and device.type == "cpu" and is_small(values)
    itemsize = max(track[0].dtype.itemsize for track in tracks) + (live.itemsize if packs else 0)
    elements = chunk_elements(values, itemsize=itemsize)
    scratches = {dtype: torch.empty(elements, dtype=dtype, device=device) for dtype in others}
    room_to_pack = torch.empty(elements, dtype=live, device=device) if packs else None
    found = []
    for followed, *moved in flat_chunks(values, *tracks, elements=elements):
        rooms = {dtype: views(scratch, followed) for dtype, scratch in scratches.items()}
        sources = [rooms.get(pieces[0].dtype, followed) for pieces in moved]
        packed = None
        conversions = [(room, followed) for room in rooms.values()]
        if room_to_pack is not None and is_small(followed) and all(piece.dim() == 1 for piece in followed):
            packed = room_to_pack[: sum(piece.numel() for piece in followed)]
            conversions = [([scratch[: packed.numel()]], [packed]) for scratch in scratches.values()]
        found.append(_Chunk(followed, moved, sources, packed, conversions))
    return found
