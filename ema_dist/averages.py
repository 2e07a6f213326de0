"""This rank's averages: what is stored, in which dtype, and how it follows the live weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from ema_dist.decay import TRACK
from ema_dist.kernels import bind, grouped, paired
from ema_dist.shards import Layout, Shard

BufferPolicy = Literal["average", "copy"]
"""What becomes of floating buffers; all others are copied under either."""


class Averages:
    """The averages of one track beside the live weights: of parameters by their parts, of buffers whole.

    Args:
        layout: the live weights.
        names: first canonical names of the parameters to average.
        dtype: of the averages; None for float32 where the live dtype is narrower, else the live dtype.
        lerped_buffers: names of the buffers that are averaged; the others are copied.

    Memory: one part of every selected parameter, and the persistent buffers.
    """

    def __init__(
        self, layout: Layout, names: Collection[str], *, dtype: torch.dtype | None, lerped_buffers: Collection[str]
    ) -> None:
        parts = {name: layout.parameters[name].part for name in names}
        self.parameters = {name: _copy(part, _average_dtype(part.local.dtype, dtype)) for name, part in parts.items()}
        self.buffers = {
            name: _copy(shard, _average_dtype(shard.local.dtype, dtype) if name in lerped_buffers else None)
            for name, shard in layout.buffers.items()
        }
        self.note_infinities()

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
        self.infinite = {name for name, average in self.parameters.items() if not _is_finite(average)}


class Tracks(Mapping[str, Averages]):
    """The averages of every track, which read each live weight once.

    Args:
        names: of the tracks.
        parameters: first canonical names of those to average.
        dtype: as for `Averages`.
        buffers: whether floating buffers are averaged or copied.
        kernel: as for `ema_dist.kernels.bind`.

    Memory: as `Averages`, each.
    """

    def __init__(
        self,
        layout: Layout,
        names: Collection[str],
        parameters: Collection[str],
        *,
        dtype: torch.dtype | None,
        buffers: BufferPolicy,
        kernel: str | None,
    ) -> None:
        self._kernel = kernel
        self._lerped_buffers = {
            name for name, shard in layout.buffers.items() if buffers == "average" and _is_inexact(shard.local.dtype)
        }
        self._tracks = {
            name: Averages(layout, parameters, dtype=dtype, lerped_buffers=self._lerped_buffers) for name in names
        }
        self.bind(layout)

    def __getitem__(self, name: str) -> Averages:
        return self._tracks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tracks)

    def __len__(self) -> int:
        return len(self._tracks)

    def named(self, track: str | None) -> Averages:
        """Those of a track; None is the only one, or the one called `TRACK`. Raises: ValueError if it is not there."""
        chosen = track or (next(iter(self)) if len(self) == 1 else TRACK)
        if chosen not in self:
            raise ValueError(f"expected one of the tracks {[*self]}, got {track!r}")
        return self[chosen]

    def bind(self, layout: Layout) -> None:
        """Follow the live weights that ``layout`` shows from now on."""
        live = {name: layout.parameters[name].part.local for name in self._first.parameters}
        infinite = set[str]().union(*(track.infinite for track in self.values()))
        self._parameters = [
            bind(columns[:-1], columns[-1], finite=finite, kernel=self._kernel)
            for finite in (True, False)
            for columns in grouped(
                [*(track.parameters[name] for track in self.values()), live[name]]
                for name in live
                if finite == (name not in infinite)
            )
        ]
        self.bind_buffers(layout)

    def bind_buffers(self, layout: Layout) -> None:
        """Follow the buffers that ``layout`` shows from now on."""
        live = {name: layout.buffers[name].local for name in self._first.buffers}
        self._buffers = [
            bind(columns[:-1], columns[-1], finite=False, kernel=self._kernel)
            for columns in grouped(
                [*(track.buffers[name] for track in self.values()), it]
                for name, it in live.items()
                if name in self._lerped_buffers
            )
        ]
        self._copied = paired(
            (track.buffers[name], it)
            for track in self.values()
            for name, it in live.items()
            if name not in self._lerped_buffers
        )

    def follow(self, weights: Mapping[str, float | Tensor]) -> None:
        """Move the averages towards the live weights: no collective, and nothing waits for the device."""
        in_order = [weights[name] for name in self]
        if any(isinstance(weight, Tensor) or weight for weight in in_order):  # between intervals nothing is even read
            for kernel in [*self._parameters, *self._buffers]:
                kernel(in_order)
        for copies, values in self._copied:
            torch._foreach_copy_(copies, values)

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels that move parameters."""
        return sorted({kernel.name for kernel in self._parameters})

    @property
    def _first(self) -> Averages:
        return next(iter(self.values()))


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
