"""Lerps lists of averages once, without making a kernel first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ema_dist.kernels.foreach_kernel import ForeachKernel
from ema_dist.kernels.kernel import Weight
from ema_dist.kernels.scratch_kernel import ScratchKernel


@torch.no_grad()
def lerp_tracks_(
    tracks: Sequence[list[Tensor]], values: list[Tensor], weights: Sequence[Weight], *, finite: bool = True
) -> None:
    """Lerp each track's averages towards the live values, in place; live values are read once for all tracks.

    Args:
        tracks: the averages of each track, in the order of ``values``.
        weights: one for each track; see `lerp_`.
        finite: see `lerp_`.

    Memory: as `lerp_`, for each dtype among the tracks.
    Raises: ValueError when the number of weights is not the number of tracks.
    """
    if len(weights) != len(tracks):
        raise ValueError(f"expected a weight for each of the {len(tracks)} tracks, found {len(weights)}")
    active = [(track, weight) for track, weight in zip(tracks, weights, strict=True) if _changes_average(weight)]
    if not active or not values:
        return
    tracks, weights = zip(*active, strict=True)
    if all(_is_copy(weight) for weight in weights):
        for track in tracks:
            torch._foreach_copy_(track, values)
        return
    # On devices other than the CPU, a chunk does not stay in the cache long enough to be worth the launches.
    is_read_once = len(tracks) == 1 or values[0].device.type != "cpu"
    is_one_call = is_read_once and all(track[0].dtype == values[0].dtype for track in tracks)
    (ForeachKernel if is_one_call else ScratchKernel)(tracks, values, finite=finite)(weights)


def lerp_(averages: list[Tensor], values: list[Tensor], weight: Weight, *, finite: bool = True) -> None:
    """Lerp each average towards its value: ``average + weight * (value - average)``, in place.

    Args:
        weight: in [0, 1]; a 0-d tensor is not copied to the host, so that a step can be skipped on the device.
        finite: False where infinities may occur (attention masks, observers): an average that would become infinite or
            NaN takes the value instead, because the difference of two infinities is NaN, and a NaN would remain.

    Memory: none for finite tensors of equal dtypes and a number as weight; else at most twice `CPU_SCRATCH_BYTES` or
    `DEVICE_SCRATCH_BYTES`, whatever the tensors' sizes.
    """
    lerp_tracks_([averages], values, [weight], finite=finite)


def _changes_average(weight: Weight) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def _is_copy(weight: Weight) -> bool:
    return not isinstance(weight, Tensor) and weight == 1
