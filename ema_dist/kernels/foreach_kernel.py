"""One multi-tensor operation of torch for each track."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ema_dist.kernels.kernel import UnsupportedKernelError, UpdateIndex, Weight
from ema_dist.kernels.lerp_equation import lerp_uniform_
from ema_dist.kernels.rounding import Rounding
from ema_dist.kernels.write_log import WriteLog


class ForeachKernel:
    """Lerps each track by one call of torch.

    Memory: none if weights are numbers and tensors are finite, else a bounded scratch.
    Raises: UnsupportedKernelError for a ``rounding``, and when averages and live values differ in dtype.
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
            raise UnsupportedKernelError(f"it rounds to nearest only; found {type(rounding).__name__}")
        if other_dtypes := {track[0].dtype for track in tracks if track} - {value.dtype for value in values[:1]}:
            raise UnsupportedKernelError(
                "it needs averages and live weights of the same dtype; found averages of "
                f"{other_dtypes} and live weights of {values[0].dtype}"
            )
        self._tracks = tracks
        self._values = values
        self._finite = finite

    @torch.no_grad()
    def __call__(
        self,
        weights: Sequence[Weight],
        update_index: UpdateIndex = 0,  # noqa: ARG002  as `Kernel`
        write_log: WriteLog | None = None,
    ) -> None:
        """Lerp each track by its weight."""
        for averages, weight in zip(self._tracks, weights, strict=True):
            if averages:
                lerp_uniform_(averages, self._values, weight, finite=self._finite, write_log=write_log)
