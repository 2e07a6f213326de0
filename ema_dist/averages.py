"""This rank's averages: what is stored, in which dtype, and how it follows the live weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor

from ema_dist.decay import TRACK
from ema_dist.kernels import Agree, ByChance, Follow, Place, Remainders, Update, alike, bind, joined, paired, split
from ema_dist.precision import Precision, Stochastic
from ema_dist.shards import Layout, Shard

BufferPolicy = Literal["average", "copy"]
"""What becomes of floating buffers; all others are copied under either."""


class Averages:
    """The averages of one track beside the live weights: of parameters by their parts, of buffers whole.

    Args:
        layout: the live weights.
        names: first canonical names of the parameters to average.
        precision: how they are kept.
        lerped_buffers: names of the buffers that are averaged; the others are copied.

    Memory: one part of every selected parameter, and the persistent buffers.
    """

    def __init__(
        self, layout: Layout, names: Collection[str], *, precision: Precision, lerped_buffers: Collection[str]
    ) -> None:
        parts = {name: layout.parameters[name].part for name in names}
        self.parameters = {name: _copy(part, precision.stored(part.local.dtype)) for name, part in parts.items()}
        self.buffers = {
            name: _copy(shard, precision.of_buffers.stored(shard.local.dtype) if name in lerped_buffers else None)
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
        return kept if kept.dtype == dtype else self.numbers()[name]

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

    Memory: as `Averages`, each.
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
        agree: Agree,
    ) -> None:
        self._seed = precision.rounding.seed if isinstance(precision.rounding, Stochastic) else 0
        self._kernel = kernel
        self._agree = agree
        self._lerped_buffers = {
            name for name, shard in layout.buffers.items() if buffers == "average" and _is_inexact(shard.local.dtype)
        }
        self._tracks = {
            name: Averages(layout, parameters, precision=precision, lerped_buffers=self._lerped_buffers)
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
        """Follow the live weights that ``layout`` shows from now on."""
        parts = {name: layout.parameters[name].part for name in self._first.parameters}
        infinite = set[str]().union(*(track.infinite for track in self.values()))
        self._parameters = [
            kernel
            for finite in (True, False)
            for kernel in self._kernels(
                {name: part for name, part in parts.items() if finite == (name not in infinite)}, finite=finite
            )
        ]
        self.bind_buffers(layout)

    def bind_buffers(self, layout: Layout) -> None:
        """Follow the buffers that ``layout`` shows from now on."""
        lerped = {name: shard for name, shard in layout.buffers.items() if name in self._lerped_buffers}
        self._buffers = self._kernels(lerped, finite=False)
        self._copied = paired(
            (track.buffers[name], shard.local)
            for track in self.values()
            for name, shard in layout.buffers.items()
            if name not in self._lerped_buffers
        )

    def _kernels(self, shards: Mapping[str, Shard], *, finite: bool) -> list[Follow]:
        """What moves the averages of these: as few kernels as their dtypes allow."""
        kept = [(track.all, track.rests) for track in self.values()]
        rows = {
            name: (*(its[name] for its, _ in kept), *(rests[name] for _, rests in kept if name in rests), shard.local)
            for name, shard in shards.items()
        }
        kernels: list[Follow] = []
        for names in alike(rows):
            *moved, values = (list(column) for column in zip(*(rows[name] for name in names), strict=True))
            tracks, rests = moved[: len(self)], moved[len(self) :]
            places = [Place(crc32(name.encode()), shards[name].first) for name in names]
            by_chance = ByChance(places, self._seed) if tracks[0][0].dtype == torch.bfloat16 else None
            rounding = Remainders(rests) if rests else by_chance
            kernels.append(
                bind(tracks, values, finite=finite, kernel=self._kernel, rounding=rounding, agree=self._agree)
            )
        return kernels

    def follow(self, weights: Mapping[str, float | Tensor], update: Update) -> None:
        """Move the averages towards the live weights: no collective, and nothing waits for the device.

        Args:
            weights: of the live weights, by track.
            update: the number of this update, by which bfloat16 averages are rounded.
        """
        in_order = [weights[name] for name in self]
        if any(isinstance(weight, Tensor) or weight for weight in in_order):  # between intervals nothing is even read
            for kernel in [*self._parameters, *self._buffers]:
                kernel(in_order, update)
        for copies, values in self._copied:
            torch._foreach_copy_(copies, values)

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels that move parameters."""
        return sorted({kernel.name for kernel in self._parameters})

    @property
    def _first(self) -> Averages:
        return next(iter(self.values()))


class _Numbers(Mapping[str, Tensor]):
    def __init__(self, places: Mapping[str, Tensor], rests: Mapping[str, Tensor]) -> None:
        self._places = places
        self._rests = rests

    def __getitem__(self, name: str) -> Tensor:
        place, rest = self._places[name], self._rests.get(name)
        return place if rest is None else joined(place, rest)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum proves it without the temporaries of the exact look, which is only needed where the sum overflows.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _copy(shard: Shard, dtype: torch.dtype | None) -> Tensor:
    return shard.empty(dtype).copy_(shard.local)
