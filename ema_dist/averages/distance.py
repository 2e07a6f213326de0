"""How far averages are from the live weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ema_dist.averages.first_rank import SendingDevices
from ema_dist.sharding import Layout


@torch.no_grad()
def relative_distance(layout: Layout, averages: Mapping[str, Tensor], *, is_collective: bool) -> float:
    """``|average - live| / |live|`` in the Euclidean norm over all ``averages``, computed in float64.

    An element that several ranks hold counts once. Where both values are the same infinity or NaN, their difference is
    0, and live values that are not finite count as 0. A live model of zeros is at distance 0 or infinity.

    Args:
        averages: this rank's averages of parameters, by name.
        is_collective: whether other ranks hold other parts.

    Collective: one all-reduce of three numbers for each parameter, if ``is_collective``.
    Memory: a few copies in float64 of one averaged part.
    """
    numel = torch.tensor([layout.parameters[name].shape.numel() for name in averages], dtype=torch.float64)
    rows = [_sums(layout, name, average) for name, average in averages.items()]
    sums = torch.stack([row.to(rows[0].device) for row in rows])  # one model may be on several devices
    group = layout.group if is_collective else None
    if group is not None:
        sums = sums.to(SendingDevices(group, layout).for_tensor())
        dist.all_reduce(sums, group=group)
    counts, differences, live = sums.cpu().unbind(dim=1)
    # How often each element was counted: on every replica, for instance. Expanded tensors hold elements once for many.
    copies = counts / numel
    held = counts > 0
    difference, size = ((squares[held] / copies[held]).sum().item() for squares in (differences, live))
    if size == 0:
        return math.inf if difference else 0.0
    return math.sqrt(difference / size)


def _sums(layout: Layout, name: str, average: Tensor) -> Tensor:
    """The number of elements in this rank's averaged part, and the squares of the difference and of the live values."""
    live = layout.parameters[name].averaged_part.local
    dtype = torch.promote_types(average.dtype, torch.float64)  # complex128 for complex averages
    expected, actual = live.to(average.device, dtype), average.to(dtype)
    is_same = (expected == actual) | (expected.isnan() & actual.isnan())
    difference = (actual - expected).abs().masked_fill(is_same, 0)
    size = expected.abs().nan_to_num(0, 0, 0)
    return torch.stack(
        [torch.full_like(difference.sum(), live.numel()), difference.square().sum(), size.square().sum()]
    )
