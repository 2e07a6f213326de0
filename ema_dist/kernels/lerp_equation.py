"""The equation ``average + weight * (value - average)`` on lists of one dtype each; other kernels call it."""

from __future__ import annotations

import torch
from torch import Tensor

from ema_dist.kernels.kernel import Weight
from ema_dist.kernels.lists import chunks
from ema_dist.kernels.scratch import max_scratch_bytes
from ema_dist.kernels.write_log import WriteLog


def lerp_uniform_(
    averages: list[Tensor], values: list[Tensor], weight: Weight, *, finite: bool, write_log: WriteLog | None = None
) -> None:
    """Lerp each average towards its value, in place; both lists have one dtype.

    Weights of 0 and 1 are exact. If ``weight`` is a number and the tensors are finite, this is one call of torch;
    otherwise averages that would become infinite or NaN take the value instead, as in `lerp_`.
    """
    write_log = write_log or WriteLog()
    if not isinstance(weight, Tensor) and weight in (0, 1):
        if weight:
            write_log.write(torch._foreach_copy_, averages, values)
    elif not isinstance(weight, Tensor) and finite:
        write_log.write(torch._foreach_lerp_, averages, values, weight)
    else:
        weight = weight.to(averages[0].device) if isinstance(weight, Tensor) else weight
        for targets, sources in chunks(averages, values, max_bytes=max_scratch_bytes(averages[0]) // 8):
            write_log.write(torch._foreach_copy_, targets, _lerp_nonfinite(targets, sources, weight))


def _lerp_nonfinite(averages: list[Tensor], values: list[Tensor], weight: Weight) -> list[Tensor]:
    """The new averages. Concatenates the tensors first, so that their number does not change the number of launches."""
    average = torch.cat([tensor.reshape(-1) for tensor in averages])
    value = torch.cat([value.reshape(-1) for value in values])
    if isinstance(weight, Tensor):
        result = average + (value - average) * weight
        result = torch.where(result.isfinite() & (weight < 1), result, value)
        result = torch.where(weight > 0, result, average)
    else:
        result = torch.lerp(average, value, weight)
        result = torch.where(result.isfinite(), result, value)
    pieces = result.split([tensor.numel() for tensor in averages])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, averages, strict=True)]
