"""What moves averages by nothing but torch's own operations, whatever they are and however they are rounded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ema_dist.kernels.chunked import InChunks
from ema_dist.kernels.compensated import Compensated
from ema_dist.kernels.follow import Follow
from ema_dist.kernels.rounding import ByChance, Remainders, Rounding
from ema_dist.kernels.stochastic import Stochastic


def in_chunks(
    tracks: Sequence[list[Tensor]], values: list[Tensor], *, finite: bool = True, rounding: Rounding | None = None
) -> Follow:
    """Move them chunk by chunk through a scratch; see `bind`."""
    match rounding:
        case ByChance():
            return Stochastic(tracks, values, rounding, finite=finite)
        case Remainders():
            return Compensated(tracks, values, rounding, finite=finite)
        case None:
            return InChunks(tracks, values, finite=finite)


def in_chunks_only(
    tensors: Sequence[int],
    tracks: Sequence[list[Tensor]],
    values: list[Tensor],
    *,
    finite: bool,
    rounding: Rounding | None,
) -> Follow:
    """As `in_chunks`, of these tensors only."""
    some_tracks = [[track[tensor] for tensor in tensors] for track in tracks]
    some_values = [values[tensor] for tensor in tensors]
    return in_chunks(some_tracks, some_values, finite=finite, rounding=rounding and rounding.of(tensors))
