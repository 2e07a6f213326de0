"""This rank's averages: what is stored, in which dtype, and how it follows the live weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Literal
from weakref import finalize

import torch
from torch import Tensor

from ema_dist.decay import TRACK
from ema_dist.kernels import Follow, Update, Weight, bind, grouped, paired
from ema_dist.offload import Offload, Offloaded, Worker
from ema_dist.shards import Layout, Shard
from ema_dist.side_streams import SideStreams

BufferPolicy = Literal["average", "copy"]
"""What becomes of floating buffers; all others are copied under either."""


class Averages:
    """The averages of one track beside the live weights: of parameters by their parts, of buffers whole.

    Args:
        layout: the live weights.
        names: first canonical names of the parameters to average.
        dtype: of the averages; None for float32 where the live dtype is narrower, else the live dtype.
        lerped_buffers: names of the buffers that are averaged; the others are copied.
        device: where they are; None for where the live weights are.

    Memory: one part of every selected parameter, and the persistent buffers.
    """

    def __init__(
        self,
        layout: Layout,
        names: Collection[str],
        *,
        dtype: torch.dtype | None,
        lerped_buffers: Collection[str],
        device: torch.device | None = None,
    ) -> None:
        parts = {name: layout.parameters[name].part for name in names}
        self.parameters = {
            name: _copy(part, _average_dtype(part.local.dtype, dtype), device) for name, part in parts.items()
        }
        self.buffers = {
            name: _copy(shard, _average_dtype(shard.local.dtype, dtype) if name in lerped_buffers else None, device)
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
        store: where they are kept, if not beside the live weights.

    Memory: as `Averages`, each; and as the store.
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
        store: Offloaded | None = None,
    ) -> None:
        self._kernel = kernel
        self.store = store
        self.streams = SideStreams({shard.local.device for shard in layout.shards})
        """On which updates may go on; whoever writes to live weights or reads averages joins them first."""
        # Memory of averages that nobody holds any more must not be given away before the side stream has left it.
        finalize(self, self.streams.join).atexit = False  # pyrefly: ignore[missing-attribute]  it has it
        self._offload = partial(Offload, worker=Worker(), streams=self.streams, store=store) if store else None
        self._parameters: list[Follow] = []
        self._buffers: list[Follow] = []
        self._copied: list[Follow] = []
        self._lerped_buffers = {
            name for name, shard in layout.buffers.items() if buffers == "average" and _is_inexact(shard.local.dtype)
        }
        device = torch.device("cpu") if store else None
        self._tracks = {
            name: Averages(layout, parameters, dtype=dtype, lerped_buffers=self._lerped_buffers, device=device)
            for name in names
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
        """Follow the live weights that ``layout`` shows from now on. Raises: as `drain`, after that."""
        try:
            self.drain()
        finally:
            self._parameters = []  # what they take is free for the new ones
            live = {name: layout.parameters[name].part.local for name in self._first.parameters}
            self._parameters = self._following(live, self._parameter_kernels)
            self.bind_buffers(layout)

    def bind_buffers(self, layout: Layout) -> None:
        """Follow the buffers that ``layout`` shows from now on. Raises: as `drain`, after that."""
        try:
            self.drain()
        finally:
            live = {name: layout.buffers[name].local for name in self._first.buffers}
            lerped = {name: value for name, value in live.items() if name in self._lerped_buffers}
            copied = {name: value for name, value in live.items() if name not in self._lerped_buffers}
            self._buffers = self._following(lerped, partial(self._kernels, finite=False))
            self._copied = self._following(copied, self._copies)

    def follow(self, weights: Mapping[str, float | Tensor], update: Update = 0, *, overlap: bool = False) -> None:
        """Move the averages towards the live weights: no collective, and nothing waits for the device.

        Args:
            weights: of the live weights, by track.
            update: its number.
            overlap: a device may do it beside what it is told next, until `streams` are joined.

        Raises: RuntimeError when an earlier update failed, on its thread.
        """
        in_order = [weights[name] for name in self]
        is_taken = any(isinstance(weight, Tensor) or weight for weight in in_order)
        self.streams.join()
        for kernel in [*(self._buffers if is_taken else ()), *self._copied]:
            kernel(in_order, update)
        self.streams.join()  # the next forward pass may write to buffers
        if is_taken:  # between intervals nothing is even read
            with self.streams.beside([*in_order, update]) if overlap else nullcontext():
                for kernel in self._parameters:
                    kernel(in_order, update)
        if not overlap:
            self.streams.join()

    def drain(self) -> None:
        """Return when the averages have followed, and can be read by whoever a device is told of next.

        Raises: RuntimeError when an update failed, on its thread.
        """
        self.streams.join()
        with ExitStack() as of_all:  # also when one of them raises
            for kernel in [*self._parameters, *self._buffers, *self._copied]:
                if isinstance(kernel, Offload):
                    of_all.callback(kernel.drain)

    def _following(
        self, live: Mapping[str, Tensor], bind: Callable[[Mapping[str, Tensor]], list[Follow]]
    ) -> list[Follow]:
        """What moves the averages towards live values: the kernels, or what lets them do it later."""
        if not live or not self._offload:
            return bind(live)
        return [self._offload([*live.values()], lambda copies: bind(dict(zip(live, copies, strict=True))))]

    def _parameter_kernels(self, values: Mapping[str, Tensor]) -> list[Follow]:
        infinite = set[str]().union(*(track.infinite for track in self.values()))
        return [
            kernel
            for finite in (True, False)
            for kernel in self._kernels(
                {name: value for name, value in values.items() if finite == (name not in infinite)}, finite=finite
            )
        ]

    def _kernels(self, values: Mapping[str, Tensor], *, finite: bool) -> list[Follow]:
        """What moves the averages of these towards them."""
        averages = [track.all for track in self.values()]
        rows = ([*(its[name] for its in averages), value] for name, value in values.items())
        return [bind(columns[:-1], columns[-1], finite=finite, kernel=self._kernel) for columns in grouped(rows)]

    def _copies(self, values: Mapping[str, Tensor]) -> list[Follow]:
        pairs = [(track.buffers[name], value) for track in self.values() for name, value in values.items()]
        return [Copies(pairs)]

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels that move parameters."""
        return sorted({kernel.name for kernel in self._parameters})

    @property
    def _first(self) -> Averages:
        return next(iter(self.values()))


class Copies:
    """Buffers that are not averaged, whatever the weights.

    Args:
        pairs: each copy, and what is copied there.
    """

    name = "copy"

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._lists = paired(pairs)

    def __call__(self, weights: Sequence[Weight], update: Update = 0) -> None:  # noqa: ARG002  as `Follow`
        """Copy them as they are now."""
        for copies, values in self._lists:
            torch._foreach_copy_(copies, values)


def _average_dtype(live: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    if live.is_complex:
        return torch.complex64 if wanted is None and live == torch.complex32 else live
    return wanted or (torch.float32 if live.itemsize < torch.float32.itemsize else live)


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum proves it without the temporaries of the exact look, which is only needed where the sum overflows.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _copy(shard: Shard, dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
    average = shard.empty(dtype, device)
    return average.copy_(shard.local.to(average.device))  # from one device to another first: casts take memory
