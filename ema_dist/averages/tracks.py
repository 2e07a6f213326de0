"""This rank's averages: what is stored, in which dtype, and how it follows the live weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Literal
from weakref import finalize
from zlib import crc32

import torch
from torch import Tensor

from ema_dist.averages.offload import Offload, Offloaded, Worker
from ema_dist.averages.precision import Precision, Stochastic
from ema_dist.averages.side_streams import SideStreams
from ema_dist.kernels import (
    Agree,
    ByChance,
    Follow,
    Place,
    Remainders,
    Update,
    Weight,
    alike,
    bind,
    joined,
    paired,
    split,
)
from ema_dist.schedules.decay import TRACK
from ema_dist.sharding import Layout, Shard

BufferPolicy = Literal["average", "copy"]
"""What becomes of floating buffers; all others are copied under either."""


class Averages:
    """The averages of one track beside the live weights: of parameters by their parts, of buffers whole.

    Args:
        layout: the live weights.
        names: first canonical names of the parameters to average.
        precision: how they are kept.
        lerped_buffers: names of the buffers that are averaged; the others are copied.
        device: where they are; None for where the live weights are.

    Memory: one part of every selected parameter, and the persistent buffers.
    """

    def __init__(
        self,
        layout: Layout,
        names: Collection[str],
        *,
        precision: Precision,
        lerped_buffers: Collection[str],
        device: torch.device | None = None,
    ) -> None:
        parts = {name: layout.parameters[name].part for name in names}
        self.parameters = {
            name: _copy(part, precision.stored(part.local.dtype), device) for name, part in parts.items()
        }
        of_buffers = {name: precision.of_buffers if name in lerped_buffers else None for name in layout.buffers}
        self.buffers = {
            name: _copy(shard, its.stored(shard.local.dtype) if (its := of_buffers[name]) else None, device)
            for name, shard in layout.buffers.items()
        }
        self.rests = {
            name: torch.zeros_like(self.parameters[name], dtype=torch.int16)
            for name, part in parts.items()
            if precision.splits(part.local.dtype)
        }
        """What averages of parameters lack, where they are kept in two halves."""
        self.note_infinities()

    @property
    def all(self) -> dict[str, Tensor]:
        """Averages of parameters and buffers by name, as they are kept."""
        return self.parameters | self.buffers

    def numbers(self, places: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """The averages by name; those that are kept in two halves as float32, each made when it is asked for.

        Args:
            places: where `all` of them lie now, if the model has them.
        """
        return _Numbers(self.all if places is None else places, self.rests)

    def copies(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of what `numbers` gave: those that it had to make are such."""
        return {name: it if name in self.rests else it.clone() for name, it in numbers.items()}

    def shown(self, name: str, dtype: torch.dtype) -> Tensor:
        """What becomes a weight of this dtype: the average as it is kept, or its number where that says more."""
        kept = self._kept(name)
        return kept if kept.dtype == dtype else _number(kept, self.rests.get(name))

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Take ``value`` over as an average, unless it lies there already."""
        kept = self._kept(name)
        if value.data_ptr() == kept.data_ptr():
            return
        if name in self.rests:
            value, rest = split(value.float())
            self.rests[name].copy_(rest)
        kept.copy_(value)

    def _kept(self, name: str) -> Tensor:
        return (self.parameters if name in self.parameters else self.buffers)[name]

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
        precision: as for `Averages`.
        buffers: whether floating buffers are averaged or copied.
        kernel: as for `ema_dist.kernels.bind`; `agree` too.
        store: where they are kept, if not beside the live weights.

    Memory: as `Averages`, each; and as the store.
    """

    def __init__(
        self,
        layout: Layout,
        names: Collection[str],
        parameters: Collection[str],
        *,
        precision: Precision,
        buffers: BufferPolicy,
        kernel: str | None,
        agree: Agree | None,
        store: Offloaded | None = None,
    ) -> None:
        self._seed = precision.rounding.seed if isinstance(precision.rounding, Stochastic) else 0
        self._kernel = kernel
        self._agree = agree
        self.store = store
        self.streams = SideStreams({shard.local.device for shard in layout.shards})
        """On which updates may go on; whoever writes to live weights or reads averages joins them first."""
        # Memory of averages that nobody holds any more must not be given away before the side stream has left it.
        finalize(self, self.streams.join).atexit = False  # pyrefly: ignore[missing-attribute]  it has it
        self._offload = partial(Offload, worker=Worker(), streams=self.streams, store=store) if store else None
        self.followed = 0
        """How often they have followed the live weights."""
        self._parameters: list[Follow] = []
        self._buffers: list[Follow] = []
        self._copied: list[Follow] = []
        self._lerped_buffers = {
            name for name, shard in layout.buffers.items() if buffers == "average" and _is_inexact(shard.local.dtype)
        }
        device = torch.device("cpu") if store else None
        self._tracks = {
            name: Averages(layout, parameters, precision=precision, lerped_buffers=self._lerped_buffers, device=device)
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
            self._parameters = self._following(live, partial(self._parameter_kernels, layout=layout))
            self.bind_buffers(layout)

    def bind_buffers(self, layout: Layout) -> None:
        """Follow the buffers that ``layout`` shows from now on. Raises: as `drain`, after that."""
        try:
            self._drain([*self._buffers, *self._copied])
        finally:
            live = {name: layout.buffers[name].local for name in self._first.buffers}
            lerped = {name: value for name, value in live.items() if name in self._lerped_buffers}
            copied = {name: value for name, value in live.items() if name not in self._lerped_buffers}
            self._buffers = self._following(lerped, partial(self._kernels, layout=layout, finite=False))
            self._copied = self._following(copied, self._copies)

    def follow(self, weights: Mapping[str, float | Tensor], update: Update, *, overlap: bool = False) -> None:
        """Move the averages towards the live weights: no collective, and nothing waits for the device.

        Args:
            weights: of the live weights, by track.
            update: the number of this update, by which bfloat16 averages are rounded.
            overlap: a device may do it beside what it is told next, until `streams` are joined.

        Raises: RuntimeError when an earlier update failed, on its thread.
        """
        self.followed += 1
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
        self._drain([*self._parameters, *self._buffers, *self._copied])

    def _drain(self, kernels: Iterable[Follow]) -> None:
        self.streams.join()
        with ExitStack() as of_all:  # also when one of them raises
            for kernel in kernels:
                if isinstance(kernel, Offload):
                    of_all.callback(kernel.drain)

    def _following(
        self, live: Mapping[str, Tensor], bind: Callable[[Mapping[str, Tensor]], list[Follow]]
    ) -> list[Follow]:
        """What moves the averages towards live values: the kernels, or what lets them do it later."""
        if not live or not self._offload:
            return bind(live)
        return [self._offload([*live.values()], lambda copies: bind(dict(zip(live, copies, strict=True))))]

    def _parameter_kernels(self, values: Mapping[str, Tensor], *, layout: Layout) -> list[Follow]:
        infinite = set[str]().union(*(track.infinite for track in self.values()))
        return [
            kernel
            for finite in (True, False)
            for kernel in self._kernels(
                {name: value for name, value in values.items() if finite == (name not in infinite)},
                layout=layout,
                finite=finite,
            )
        ]

    def _kernels(self, values: Mapping[str, Tensor], *, layout: Layout, finite: bool) -> list[Follow]:
        """What moves the averages of these towards them: as few kernels as their dtypes allow."""
        shards = layout.parameters | layout.buffers
        kept = [(track.all, track.rests) for track in self.values()]
        rows = {
            name: (*(its[name] for its, _ in kept), *(rests[name] for _, rests in kept if name in rests), value)
            for name, value in values.items()
        }
        kernels: list[Follow] = []
        for names in alike(rows):
            *moved, followed = (list(column) for column in zip(*(rows[name] for name in names), strict=True))
            tracks, rests = moved[: len(self)], moved[len(self) :]
            places = [Place(crc32(name.encode()), shards[name].part.first) for name in names]
            by_chance = ByChance(places, self._seed) if tracks[0][0].dtype == torch.bfloat16 else None
            rounding = Remainders(rests) if rests else by_chance
            kernels.append(
                bind(tracks, followed, finite=finite, kernel=self._kernel, rounding=rounding, agree=self._agree)
            )
        return kernels

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


class _Numbers(Mapping[str, Tensor]):
    def __init__(self, places: Mapping[str, Tensor], rests: Mapping[str, Tensor]) -> None:
        self._places = places
        self._rests = rests

    def __getitem__(self, name: str) -> Tensor:
        return _number(self._places[name], self._rests.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _number(kept: Tensor, rest: Tensor | None) -> Tensor:
    return kept if rest is None else joined(kept, rest)


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum proves it without the temporaries of the exact look, which is only needed where the sum overflows.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _copy(shard: Shard, dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
    average = shard.empty(dtype, device)
    return average.copy_(shard.local.to(average.device))  # from one device to another first: casts take memory
