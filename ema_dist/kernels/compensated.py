"""float32 averages as a bfloat16 and what it lacks: the model gets 16 bits of them, and no bit is lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ema_dist.kernels.lerp import Update, Weight, move_
from ema_dist.kernels.lists import flat_chunks
from ema_dist.kernels.rounding import Remainders
from ema_dist.kernels.scratch import chunk_elements, views


@torch.no_grad()
def split(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 to each float32 (of two, the larger in magnitude), and int16 remainders for `joined`.

    Memory: twice ``wide``, beside what is returned.
    """
    bits = wide.clone().view(torch.int32)
    high = torch.empty_like(bits)
    _split_(bits, high)
    return high.short().view(torch.bfloat16), bits.short()


@torch.no_grad()
def joined(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers that `split` took apart, to the bit; only a NaN may have become another one."""
    return _join_(high.view(torch.int16).int(), low).view(torch.float32)


class Compensated:
    """Moves tracks that are kept as `split` gives them: to the bit what a float32 average would be.

    It keeps views of the tensors it is made for: make another one when they move to other storage.

    Args:
        tracks: the averages of each track, bfloat16, in the order of ``values``.
        values: the live weights, of one dtype, on the averages' device.
        rounding: what is missing of each average.
        finite: False where infinities may occur; see `lerp_`.

    Memory: one scratch, kept as long as this.
    """

    name = "scratch"

    def __init__(
        self, tracks: Sequence[list[Tensor]], values: list[Tensor], rounding: Remainders, *, finite: bool = True
    ) -> None:
        self._finite = finite
        self._chunks = []
        if not tracks or not values:
            return
        elements = chunk_elements(values, itemsize=3 * torch.float32.itemsize)
        value, wide, spare = torch.empty(3, elements, dtype=torch.float32, device=values[0].device)
        self._wide, self._spare = wide.view(torch.int32), spare.view(torch.int32)
        for followed, *parts in flat_chunks(values, *tracks, *rounding.tracks, elements=elements):
            room, moved = views(value, followed), views(wide, followed)
            bits, rest = views(self._wide, followed), views(self._spare, followed)
            highs = [[piece.view(torch.int16) for piece in pieces] for pieces in parts[: len(tracks)]]
            stored = list(zip(highs, parts[len(tracks) :], strict=True))
            self._chunks.append((followed, room, moved, bits, rest, stored))

    @torch.no_grad()
    def __call__(self, weights: Sequence[Weight], update: Update = 0) -> None:  # noqa: ARG002
        """Move each track by its weight."""
        for values, room, moved, bits, rest, tracks in self._chunks:
            torch._foreach_copy_(room, values)
            size = sum(piece.numel() for piece in values)
            wide, spare = self._wide[:size], self._spare[:size]
            for (highs, lows), weight in zip(tracks, weights, strict=True):
                torch._foreach_copy_(bits, highs)
                torch._foreach_copy_(rest, lows)
                _join_(wide, spare)
                move_(moved, room, weight, finite=self._finite)
                _split_(wide, spare)
                torch._foreach_copy_(highs, rest)
                torch._foreach_copy_(lows, bits)


def _join_(high: Tensor, low: Tensor) -> Tensor:
    """The bits of float32 in the place of ``high``, which holds the upper halves as int32."""
    return high.bitwise_left_shift_(16).add_(low)


def _split_(bits: Tensor, high: Tensor) -> None:
    """Upper halves of float32 into ``high``, and what remains of ``bits`` in its own place."""
    wide = bits.view(torch.float32)
    # Other NaN would be rounded to infinities, or beyond the largest number of 32 bits.
    wide.masked_fill_(wide.isnan(), torch.nan)
    torch.add(bits, 0x8000, out=high).bitwise_right_shift_(16)
    bits.sub_(high, alpha=1 << 16)
