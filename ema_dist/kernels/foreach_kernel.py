"""Averages follow the live values: one call for any number of tracks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ema_dist.kernels.lerp import UpdateIndex, Weight, lerp_uniform_
from ema_dist.kernels.rounding import Rounding
from ema_dist.kernels.scratch_kernel import ScratchKernel


class Kernel(Protocol):
    """Moves the tracks that it was made for, at each call."""

    @property
    def name(self) -> str:
        """What `choose` and summaries call it."""
        ...

    def __call__(self, weights: Sequence[Weight], update_index: UpdateIndex = 0) -> None:
        """Move each track by its weight; only rounding by chance asks for the number of the update."""
        ...


class UnsupportedKernelError(Exception):
    """What a kernel asks for is not there; the message says what."""


class ForeachKernel:
    """Moves each track by one call of torch.

    Memory: nothing for numbers as weights and finite tensors, else a bounded scratch.
    Raises: UnfitError when averages and live values differ in dtype.
    """

    name = "foreach"

    def __init__(
        self,
        tracks: Sequence[list[Tensor]],
        values: list[Tensor],
        *,
        finite: bool = True,
        rounding: Rounding | None = None,
    ) -> None:
        if rounding:
            raise UnsupportedKernelError(f"torch rounds to nearest; found {type(rounding).__name__}")
        if other_dtypes := {track[0].dtype for track in tracks if track} - {value.dtype for value in values[:1]}:
            raise UnsupportedKernelError(
                f"torch lerps equal dtypes only; found averages of {other_dtypes} that follow {values[0].dtype}"
            )
        self._tracks = tracks
        self._values = values
        self._finite = finite

    @torch.no_grad()
    def __call__(self, weights: Sequence[Weight], update_index: UpdateIndex = 0) -> None:  # noqa: ARG002
        """Move each track by its weight."""
        for averages, weight in zip(self._tracks, weights, strict=True):
            if averages:
                lerp_uniform_(averages, self._values, weight, finite=self._finite)


@torch.no_grad()
def lerp_tracks_(
    tracks: Sequence[list[Tensor]], values: list[Tensor], weights: Sequence[Weight], *, finite: bool = True
) -> None:
    """Move each track's averages towards the live values, in place, reading those once for all tracks.

    Args:
        tracks: the averages of each track, in the order of ``values``.
        weights: one for each track; see `lerp_`.
        finite: see `lerp_`.

    Memory: as `lerp_`, for each dtype among the tracks.
    Raises: ValueError when there are not as many weights as tracks.
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
    # Elsewhere than on the CPU a chunk does not stay in a cache long enough to be worth the launches.
    is_read_once = len(tracks) == 1 or values[0].device.type != "cpu"
    is_one_call = is_read_once and all(track[0].dtype == values[0].dtype for track in tracks)
    (ForeachKernel if is_one_call else ScratchKernel)(tracks, values, finite=finite)(weights)


def lerp_(averages: list[Tensor], values: list[Tensor], weight: Weight, *, finite: bool = True) -> None:
    """Move each average towards its value: ``average + weight * (value - average)``, in place.

    Args:
        weight: in [0, 1]; a 0-d tensor stays on the device, so that a step can be left out there without asking it.
        finite: False where infinities may occur (attention masks, observers): such elements follow the value, as the
            difference of two infinities is NaN and would stay.

    Memory: nothing for finite tensors of equal dtypes and a weight known here; else at most twice
    `CPU_SCRATCH_BYTES` or `DEVICE_SCRATCH_BYTES`, whatever the tensors' sizes.
    """
    lerp_tracks_([averages], values, [weight], finite=finite)


def _changes_average(weight: Weight) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def _is_copy(weight: Weight) -> bool:
    return not isinstance(weight, Tensor) and weight == 1
