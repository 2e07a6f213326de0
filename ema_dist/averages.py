"""This rank's averages: what is stored, in which dtype, and how it follows the live weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from ema_dist.kernels import lerp_, paired
from ema_dist.shards import Layout, Shard

BufferPolicy = Literal["average", "copy"]
"""What becomes of floating buffers; all others are copied under either."""


class Averages:
    """The averages of one track beside the live weights: of parameters by their parts, of buffers whole.

    Args:
        layout: the live weights.
        names: first canonical names of the parameters to average.
        dtype: of the averages; None for float32 where the live dtype is narrower, else the live dtype.
        buffers: whether floating buffers are averaged or copied.

    Memory: one part of every selected parameter, and the persistent buffers.
    """

    def __init__(
        self, layout: Layout, names: Collection[str], *, dtype: torch.dtype | None, buffers: BufferPolicy
    ) -> None:
        parts = {name: layout.parameters[name].part for name in names}
        self._lerped_buffers = {
            name for name, shard in layout.buffers.items() if buffers == "average" and _is_inexact(shard.local.dtype)
        }
        self.parameters = {name: _copy(part, _average_dtype(part.local.dtype, dtype)) for name, part in parts.items()}
        self.buffers = {
            name: _copy(shard, _average_dtype(shard.local.dtype, dtype) if name in self._lerped_buffers else None)
            for name, shard in layout.buffers.items()
        }
        self.note_infinities()
        self.bind(layout)

    @property
    def all(self) -> dict[str, Tensor]:
        """Averages of parameters and buffers by name."""
        return self.parameters | self.buffers

    def parameter_pairs(self, layout: Layout) -> dict[str, tuple[Tensor, Tensor]]:
        """Each average, and the part of the live parameter beside it."""
        return {name: (average, layout.parameters[name].part.local) for name, average in self.parameters.items()}

    def buffer_pairs(self, layout: Layout) -> dict[str, tuple[Tensor, Tensor]]:
        """Each average, and the live buffer beside it: buffers are averaged whole."""
        return {name: (average, layout.buffers[name].local) for name, average in self.buffers.items()}

    def note_infinities(self) -> None:
        """Look once for averages with infinities (masks): they take the careful kernel. Waits for the device."""
        self._infinite = {name for name, average in self.parameters.items() if not _is_finite(average)}

    def bind(self, layout: Layout) -> None:
        """Follow the live weights that ``layout`` shows from now on."""
        pairs = self.parameter_pairs(layout)
        self._parameter_lists = [
            (*lists, finite)
            for finite in (True, False)
            for lists in paired(pair for name, pair in pairs.items() if finite == (name not in self._infinite))
        ]
        self.bind_buffers(layout)

    def bind_buffers(self, layout: Layout) -> None:
        """Follow the buffers that ``layout`` shows from now on."""
        pairs = self.buffer_pairs(layout)
        lerped = paired(pair for name, pair in pairs.items() if name in self._lerped_buffers)
        self._buffer_lists = [(*lists, False) for lists in lerped]
        self._copied_lists = paired(pair for name, pair in pairs.items() if name not in self._lerped_buffers)

    def follow(self, weight: float | Tensor) -> None:
        """Move the averages towards the live weights: no collective, and nothing waits for the device."""
        for averages, values, finite in [*self._parameter_lists, *self._buffer_lists]:
            lerp_(averages, values, weight, finite=finite)
        for copies, values in self._copied_lists:
            lerp_(copies, values, 1.0)


def _average_dtype(live: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    if live.is_complex:
        return torch.complex64 if wanted is None and live == torch.complex32 else live
    return wanted or (torch.float32 if live.itemsize < torch.float32.itemsize else live)


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum proves it without the temporaries of the exact look, which is only needed where the sum overflows.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _copy(shard: Shard, dtype: torch.dtype | None) -> Tensor:
    return shard.empty(dtype).copy_(shard.local)
