"""How far averages are from the live weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ema_dist.averages.first_rank import SendingDevices
from ema_dist.schedules.arithmetic import widest_float
from ema_dist.sharding import Layout


@torch.no_grad()
def relative_distance(layout: Layout, averages: Mapping[str, Tensor], *, is_collective: bool) -> float:
    """``|average - live| / |live|`` in the Euclidean norm over all ``averages``, computed in float64 (on MPS, float32).

    Elements held by several ranks count once. If both values are the same infinity or both NaN, the difference is 0.
    Non-finite live values count as 0 in the norm. If all live values are 0, the result is 0 or infinity.

    Args:
        averages: this rank's averages of parameters, by name.
        is_collective: whether other ranks hold parts of the averages.

    Collective: one all-reduce of three numbers for each parameter, if ``is_collective``.
    Memory: a few float64 copies of one averaged part.
    """
    numel = torch.tensor([layout.parameters[name].shape.numel() for name in averages], dtype=torch.float64)
    rows = [_square_sums(layout, name, average) for name, average in averages.items()]
    sums = torch.stack([row.to(rows[0]) for row in rows])  # one model may be on several devices
    group = layout.group if is_collective else None
    if group is not None:
        device = SendingDevices(group, layout).for_tensor()
        sums = sums.to(device, widest_float(device))
        dist.all_reduce(sums, group=group)
    counts, differences, live = sums.cpu().unbind(dim=1)
    # How often each element was counted, such as once per replica; below 1 for expanded tensors, which store one
    # element for many.
    copies = counts / numel
    held = counts > 0
    difference, size = ((squares[held] / copies[held]).sum().item() for squares in (differences, live))
    if size == 0:
        return math.inf if difference else 0.0
    return math.sqrt(difference / size)


def _square_sums(layout: Layout, name: str, average: Tensor) -> Tensor:
    """The number of elements in this rank's averaged part, and the squared norms of the difference and live values."""
    live = layout.parameters[name].averaged_part.local
    dtype = torch.promote_types(average.dtype, widest_float(average.device))  # complex128 for complex averages
    live, average = live.to(average.device, dtype), average.to(dtype)
    is_same = (live == average) | (live.isnan() & average.isnan())
    difference = (average - live).abs().masked_fill(is_same, 0)
    size = live.abs().nan_to_num(0, 0, 0)
    return torch.stack(
        [torch.full_like(difference.sum(), live.numel()), difference.square().sum(), size.square().sum()]
    )
