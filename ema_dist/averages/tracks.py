"""The averages of all tracks, updated together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Literal
from weakref import finalize
from zlib import crc32

import torch
from torch import Tensor

from ema_dist.averages.offload import Offloaded, OffloadKernel, Worker
from ema_dist.averages.precision import Precision, Stochastic
from ema_dist.averages.side_streams import SideStreams
from ema_dist.averages.track import Track
from ema_dist.kernels import (
    Agree,
    CompensatedRounding,
    Kernel,
    StochasticRounding,
    TensorOffset,
    UpdateIndex,
    Weight,
    WriteLog,
    copy_to_host,
    group_by_dtype,
    group_pairs,
    make_kernel,
)
from ema_dist.schedules.decay import DEFAULT_TRACK
from ema_dist.sharding import Layout

BufferPolicy = Literal["average", "copy"]
"""Whether floating buffers are averaged or copied; other buffers are always copied."""


class Tracks(Mapping[str, Track]):
    """The averages of every track by name; one update reads each live weight once for all of them.

    Args:
        layout: the live weights.
        names: names of the tracks.
        parameters: first canonical names of the parameters to average.
        precision: as for `Track`.
        buffers: whether floating buffers are averaged or copied.
        kernel: as for `ema_dist.kernels.make_kernel`.
        agree: as for `ema_dist.kernels.make_kernel`.
        store: offloads the averages; None to store them on the device of the live weights.

    Memory: for each track as `Track`; and as the store.
    Raises: ValueError for an unknown ``buffers`` or ``store``; else as `Track`.
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
        if store is not None and not isinstance(store, Offloaded):
            raise ValueError(f"store must be Offloaded(...) or None, got {store!r}")
        if buffers not in ("average", "copy"):
            raise ValueError(f'buffers must be "average" or "copy", got {buffers!r}')
        self._seed = precision.rounding.seed if isinstance(precision.rounding, Stochastic) else 0
        self._kernel = kernel
        self._agree = agree
        self.store = store
        self.streams: SideStreams = SideStreams({shard.local.device for shard in layout.shards})
        """Streams on which updates may still run; join them before writing to live weights or reading averages."""
        # The allocator must not reuse the memory of dropped averages before the side stream has finished with it.
        finalize(self, self.streams.join).atexit = False  # pyrefly: ignore[missing-attribute]  a documented attribute
        self._make_offload_kernel = (
            partial(OffloadKernel, worker=Worker(), streams=self.streams, store=store) if store else None
        )
        self.update_calls: int = 0
        """Number of calls of `update_averages`."""
        self._parameter_kernels: list[Kernel] = []
        self._buffer_kernels: list[Kernel] = []
        self._copy_kernels: list[Kernel] = []
        self._bound_layout: Layout | None = None
        self._averaged_buffers = {
            name for name, shard in layout.buffers.items() if buffers == "average" and _is_inexact(shard.local.dtype)
        }
        device = torch.device("cpu") if store else None
        self._tracks = {
            name: Track(layout, parameters, precision=precision, averaged_buffers=self._averaged_buffers, device=device)
            for name in names
        }
        self.bind_layout(layout)

    def __getitem__(self, name: str) -> Track:
        return self._tracks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tracks)

    def __len__(self) -> int:
        return len(self._tracks)

    def resolve(self, track: str | None) -> Track:
        """The averages of a track; None means the only track, or the one called `DEFAULT_TRACK`.

        Raises: ValueError for an unknown track.
        """
        return self[self.resolve_name(track)]

    def resolve_name(self, track: str | None) -> str:
        """The name of the track that `resolve` returns."""
        chosen = track or (next(iter(self)) if len(self) == 1 else DEFAULT_TRACK)
        if chosen not in self:
            raise ValueError(f"expected one of the tracks {[*self]}, got {track!r}")
        return chosen

    def copy_live(self, layout: Layout) -> None:
        """Overwrite all averages with the live weights and buffers. Waits for the device."""
        for track in self.values():
            for name, (average, value) in (track.parameter_pairs(layout) | track.buffer_pairs(layout)).items():
                # Cast where the average is: a cast on the device of the live weights would take memory there.
                track.write(name, value if value.device == average.device else copy_to_host(value))
        self.bind_loaded(layout)

    def bind_layout(self, layout: Layout) -> None:
        """Make kernels for the weights of ``layout``, for later updates. Raises: as `drain`, after making them."""
        self._bound_layout = None  # until all kernels are made: after an exception, no update may run with only some
        try:
            self.drain()
        finally:
            self._parameter_kernels = []  # frees the scratch of the old kernels before the new ones allocate theirs
            live = {name: layout.parameters[name].averaged_part.local for name in self._first.parameters}
            self._parameter_kernels = self._maybe_offload(live, partial(self._build_parameter_kernels, layout=layout))
            self.bind_buffers(layout)
            self._bound_layout = layout

    def bind_loaded(self, layout: Layout) -> None:
        """As `bind_layout`, after averages were loaded. Waits for the device."""
        for track in self.values():
            track.refresh_infinite_names()
        self.bind_layout(layout)

    def is_bound_to(self, layout: Layout) -> bool:
        """Whether kernels are made for the weights and buffers of ``layout``."""
        return self._bound_layout is layout

    def bind_buffers(self, layout: Layout) -> None:
        """Make kernels for the buffers of ``layout``, for later updates. Raises: as `drain`, after making them."""
        bound_layout, self._bound_layout = self._bound_layout, None
        try:
            self._drain([*self._buffer_kernels, *self._copy_kernels])
        finally:
            live = {name: layout.buffers[name].local for name in self._first.buffers}
            averaged = {name: value for name, value in live.items() if name in self._averaged_buffers}
            copied = {name: value for name, value in live.items() if name not in self._averaged_buffers}
            self._buffer_kernels = self._maybe_offload(
                averaged, partial(self._build_kernels, layout=layout, finite=False)
            )
            self._copy_kernels = self._maybe_offload(copied, self._build_copy_kernels)
            self._bound_layout = bound_layout

    def update_averages(
        self,
        weights: Mapping[str, float | Tensor],
        update_index: UpdateIndex,
        write_log: WriteLog,
        *,
        overlap: bool = False,
    ) -> None:
        """Move the averages towards the live weights, without a collective and without waiting for the device.

        Args:
            weights: the weight of the live values, by track. A weight of 0 leaves the averages unchanged; buffers that
                are not averaged are still copied.
            update_index: the number of this update; stochastic rounding derives its random bits from it.
            write_log: records the writes that this update has already made, for the case that it is interrupted.
            overlap: run the update of parameters on a side stream, until `streams` are joined.

        Raises: RuntimeError when an earlier update failed on its thread.
        """
        self.update_calls += 1
        write_log.restart()
        ordered_weights = [weights[name] for name in self]
        is_update_due = any(isinstance(weight, Tensor) or weight for weight in ordered_weights)
        self.streams.join()
        for kernel in [*(self._buffer_kernels if is_update_due else ()), *self._copy_kernels]:
            kernel(ordered_weights, update_index, write_log)
        self.streams.join()  # before the next forward pass, which may write to buffers
        if is_update_due:
            with self.streams.fork([*ordered_weights, update_index]) if overlap else nullcontext():
                for kernel in self._parameter_kernels:
                    kernel(ordered_weights, update_index, write_log)
        if not overlap:
            self.streams.join()

    def drain(self) -> None:
        """Finish pending updates: now if they run on a thread, else before later work on the current stream.

        Raises: RuntimeError when an update failed on its thread.
        """
        self._drain([*self._parameter_kernels, *self._buffer_kernels, *self._copy_kernels])

    def _drain(self, kernels: Iterable[Kernel]) -> None:
        self.streams.join()
        with ExitStack() as stack:  # drains every kernel even if one raises
            for kernel in kernels:
                if isinstance(kernel, OffloadKernel):
                    stack.callback(kernel.drain)

    def _maybe_offload(
        self, live: Mapping[str, Tensor], make_kernels: Callable[[Mapping[str, Tensor]], list[Kernel]]
    ) -> list[Kernel]:
        """The kernels that update averages from ``live``, inside an `OffloadKernel` if the averages are offloaded."""
        if not live or not self._make_offload_kernel:
            return make_kernels(live)
        return [
            self._make_offload_kernel(
                [*live.values()], lambda host_copies: make_kernels(dict(zip(live, host_copies, strict=True)))
            )
        ]

    def _build_parameter_kernels(self, values: Mapping[str, Tensor], *, layout: Layout) -> list[Kernel]:
        infinite_names = set[str]().union(*(track.infinite_names for track in self.values()))
        return [
            kernel
            for finite in (True, False)
            for kernel in self._build_kernels(
                {name: value for name, value in values.items() if finite == (name not in infinite_names)},
                layout=layout,
                finite=finite,
            )
        ]

    def _build_kernels(self, values: Mapping[str, Tensor], *, layout: Layout, finite: bool) -> list[Kernel]:
        """The kernels that update the averages of ``values``: one for each combination of device and dtypes."""
        shards = layout.parameters | layout.buffers
        stored = [(track.tensors, track.residuals) for track in self.values()]
        rows = {
            name: (
                *(tensors[name] for tensors, _ in stored),
                *(residuals[name] for _, residuals in stored if name in residuals),
                value,
            )
            for name, value in values.items()
        }
        kernels: list[Kernel] = []
        for names in group_by_dtype(rows):
            *stored_columns, live_values = (
                list(column) for column in zip(*(rows[name] for name in names), strict=True)
            )
            tracks, residuals = stored_columns[: len(self)], stored_columns[len(self) :]
            rounding = CompensatedRounding(residuals) if residuals else None
            if not residuals and tracks[0][0].dtype == torch.bfloat16:
                tensor_offsets = [
                    TensorOffset(crc32(name.encode()), shards[name].averaged_part.global_offset) for name in names
                ]
                rounding = StochasticRounding(tensor_offsets, self._seed)
            agree = self._agree and partial(_agree_on_full_sizes, self._agree, [shards[name].shape for name in names])
            kernels.append(
                make_kernel(tracks, live_values, finite=finite, kernel=self._kernel, rounding=rounding, agree=agree)
            )
        return kernels

    def _build_copy_kernels(self, values: Mapping[str, Tensor]) -> list[Kernel]:
        pairs = [(track.buffers[name], value) for track in self.values() for name, value in values.items()]
        return [CopyKernel(pairs)]

    @property
    def kernel_names(self) -> list[str]:
        """The names of the kernels that update averages of parameters."""
        return sorted({kernel.name for kernel in self._parameter_kernels})

    @property
    def _first(self) -> Track:
        return next(iter(self.values()))


class CopyKernel:
    """Copies buffers that are not averaged; the weights have no effect.

    Args:
        pairs: (target, source) of each copy.
    """

    name = "copy"

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._lists = group_pairs(pairs)

    def __call__(
        self,
        weights: Sequence[Weight],  # noqa: ARG002  as `Kernel`
        update_index: UpdateIndex = 0,  # noqa: ARG002  as `Kernel`
        write_log: WriteLog | None = None,
    ) -> None:
        """Copy the current values."""
        write_log = write_log or WriteLog()
        for targets, values in self._lists:
            write_log.write(torch._foreach_copy_, targets, values)


def _agree_on_full_sizes(agree: Agree, shapes: Sequence[torch.Size], question: str, answer: str) -> str:
    """The answer of all ranks whose parts are of tensors that have these sizes in full: their own sizes may differ."""
    return agree(f"{question}, {len(shapes)} tensors of {sum(map(torch.Size.numel, shapes))} elements", answer)


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
