"""Stores float32 averages as bfloat16 plus an int16 residual: models can use the bfloat16 part, and no bit is lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ema_dist.kernels.kernel import UpdateIndex, Weight
from ema_dist.kernels.lerp_equation import lerp_uniform_
from ema_dist.kernels.lists import flat_chunks
from ema_dist.kernels.rounding import CompensatedRounding
from ema_dist.kernels.scratch import chunk_elements, scratch_views
from ema_dist.kernels.write_log import WriteLog


@torch.no_grad()
def split_hi_lo(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 nearest to each float32 (ties away from zero), and the int16 residual that `recombine` needs.

    Memory: twice ``wide``, besides the results.
    """
    bits = wide.clone().view(torch.int32)
    high = torch.empty_like(bits)
    _split_(bits, high)
    return high.short().view(torch.bfloat16), bits.short()


@torch.no_grad()
def recombine(high: Tensor, low: Tensor) -> Tensor:
    """The inverse of `split_hi_lo`, bit-identical except that a NaN may become a different NaN."""
    return _recombine_(high.view(torch.int16).int(), low).view(torch.float32)


class CompensatedKernel:
    """Lerps tracks that are stored as `split_hi_lo` splits them; the results are bit-identical to float32 averages.

    It keeps views of the tensors: make another kernel when they get other storage.

    Args:
        tracks: the bfloat16 averages of each track, in the order of ``values``.
        values: the live weights, of one dtype, on the averages' device.
        rounding: the residuals of the averages.
        finite: False where infinities may occur; see `lerp_`.

    Memory: one scratch, which the kernel keeps.
    """

    name = "scratch"

    def __init__(
        self,
        tracks: Sequence[list[Tensor]],
        values: list[Tensor],
        rounding: CompensatedRounding,
        *,
        finite: bool = True,
    ) -> None:
        self._finite = finite
        self._chunks = []
        if not tracks or not values:
            return
        elements = chunk_elements(values, itemsize=3 * torch.float32.itemsize)
        value, wide, spare = torch.empty(3, elements, dtype=torch.float32, device=values[0].device)
        self._wide, self._spare = wide.view(torch.int32), spare.view(torch.int32)
        for live_pieces, *parts in flat_chunks(values, *tracks, *rounding.residuals, elements=elements):
            wide_values, wide_averages = scratch_views(value, live_pieces), scratch_views(wide, live_pieces)
            bits, residual_pieces = scratch_views(self._wide, live_pieces), scratch_views(self._spare, live_pieces)
            highs = [[piece.view(torch.int16) for piece in pieces] for pieces in parts[: len(tracks)]]
            stored = list(zip(highs, parts[len(tracks) :], strict=True))
            self._chunks.append((live_pieces, wide_values, wide_averages, bits, residual_pieces, stored))

    @torch.no_grad()
    def __call__(
        self,
        weights: Sequence[Weight],
        update_index: UpdateIndex = 0,  # noqa: ARG002  as `Kernel`
        write_log: WriteLog | None = None,
    ) -> None:
        """Lerp each track by its weight."""
        write_log = write_log or WriteLog()
        for values, wide_values, wide_averages, bits, residual_pieces, tracks in self._chunks:
            torch._foreach_copy_(wide_values, values)
            size = sum(piece.numel() for piece in values)
            wide, spare = self._wide[:size], self._spare[:size]
            for (highs, lows), weight in zip(tracks, weights, strict=True):
                torch._foreach_copy_(bits, highs)
                torch._foreach_copy_(residual_pieces, lows)
                _recombine_(wide, spare)
                lerp_uniform_(wide_averages, wide_values, weight, finite=self._finite)
                _split_(wide, spare)
                write_log.write(torch._foreach_copy_, [*highs, *lows], [*residual_pieces, *bits])


def _recombine_(high: Tensor, low: Tensor) -> Tensor:
    """Replace ``high``, the bfloat16 bits as int32, with the bits of the float32."""
    return high.bitwise_left_shift_(16).add_(low)


def _split_(bits: Tensor, high: Tensor) -> None:
    """Write the bfloat16 bits into ``high``, and replace the float32 ``bits`` with the residuals."""
    wide = bits.view(torch.float32)
    # Every NaN becomes the same one: rounding the bits of other NaNs would give infinities, or overflow.
    wide.masked_fill_(wide.isnan(), torch.nan)
    torch.add(bits, 0x8000, out=high).bitwise_right_shift_(16)
    bits.sub_(high, alpha=1 << 16)
