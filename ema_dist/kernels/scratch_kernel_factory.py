"""Makes the kernel named ``scratch``, which needs only torch and supports all tensors; one class for each rounding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ema_dist.kernels.compensated_kernel import CompensatedKernel
from ema_dist.kernels.kernel import Kernel
from ema_dist.kernels.rounding import CompensatedRounding, Rounding, StochasticRounding
from ema_dist.kernels.scratch_kernel import ScratchKernel
from ema_dist.kernels.stochastic_kernel import StochasticKernel


def make_scratch_kernel(
    tracks: Sequence[list[Tensor]], values: list[Tensor], *, finite: bool = True, rounding: Rounding | None = None
) -> Kernel:
    """A kernel that lerps chunk by chunk through a scratch; the arguments are those of `make_kernel`."""
    match rounding:
        case StochasticRounding():
            return StochasticKernel(tracks, values, rounding, finite=finite)
        case CompensatedRounding():
            return CompensatedKernel(tracks, values, rounding, finite=finite)
        case None:
            return ScratchKernel(tracks, values, finite=finite)


def make_subset_kernel(
    indices: Sequence[int],
    tracks: Sequence[list[Tensor]],
    values: list[Tensor],
    *,
    finite: bool,
    rounding: Rounding | None,
) -> Kernel:
    """As `make_scratch_kernel`, for the tensors at ``indices`` only."""
    some_tracks = [[track[index] for index in indices] for track in tracks]
    some_values = [values[index] for index in indices]
    return make_scratch_kernel(some_tracks, some_values, finite=finite, rounding=rounding and rounding.subset(indices))
