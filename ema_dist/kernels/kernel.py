"""The protocol of kernels: the calls that every implementation supports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ema_dist.kernels.write_log import WriteLog

Weight = float | Tensor
"""The weight of the live values, in [0, 1]: a number, or a 0-d tensor, which is never copied to the host."""

UpdateIndex = int | Tensor
"""The number of an update: an int, or a 0-d tensor if the device counts updates or a CUDA graph captures the kernel."""


class Kernel(Protocol):
    """Each call lerps the tracks that the kernel was made for."""

    @property
    def name(self) -> str:
        """Its name in `KERNELS`."""
        ...

    def __call__(
        self, weights: Sequence[Weight], update_index: UpdateIndex = 0, write_log: WriteLog | None = None
    ) -> None:
        """Lerp each track by its weight; only stochastic rounding reads ``update_index``.

        Args:
            write_log: records the writes to averages. If an interrupted call is repeated with the same log, it skips
                the writes that are recorded.
        """
        ...


class UnsupportedKernelError(Exception):
    """This machine or these tensors lack something that the kernel needs; the message names it."""
