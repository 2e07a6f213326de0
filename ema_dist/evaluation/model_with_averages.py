"""A live model together with its averages: kept in step with each other, swapped, served and gathered."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ema_dist.averages.full_weights import gather
from ema_dist.averages.live_model import LiveModel
from ema_dist.averages.track import Track
from ema_dist.averages.tracks import Tracks
from ema_dist.evaluation.serving import Serving, active_servings
from ema_dist.evaluation.swap import Swap, active_swaps
from ema_dist.messages import abbreviated
from ema_dist.modes import in_normal_mode


class ModelWithAverages:
    """The ``live`` model and the averages of ``tracks``; at most one swap or serving is active at a time."""

    def __init__(self, live: LiveModel, tracks: Tracks) -> None:
        self.live = live
        self.tracks = tracks
        self.swap: Swap | None = None
        """The active swap; None while the model holds its live weights."""
        self._servings: dict[Track, Serving] = {}
        self._warned: set[Track] = set()
        """Tracks for which a warning has reported that `serving` swaps."""

    def prepare(self, call: str, *, collective: bool, only_if_moved: bool = False) -> None:
        """Finish pending updates, refresh the layout, and bind the averages to it; see `LiveModel.prepare`."""
        old_layout = self.live.layout
        problem = None
        try:
            self.tracks.drain()
        except RuntimeError as error:  # reported to the other ranks, which would else wait for this one
            problem = error
        try:
            self.live.prepare(call, collective=collective, only_if_moved=only_if_moved, problem=problem)
        finally:
            if self.live.layout is not old_layout:
                self.tracks.bind_layout(self.live.layout)

    def prepare_update(self) -> None:
        """A cheap `prepare` for each step: refreshes the layout only if a tensor has moved, and waits for no update.

        Raises: ValueError when the model has changed.
        """
        if self.live.layout.has_moved():
            self.prepare("update()", collective=False)
        elif self.live.layout.refresh_buffers():
            self._servings.clear()  # a cached serving would put the old buffers back on leaving
            self.tracks.bind_buffers(self.live.layout)

    def averages_now(self, track: Track) -> Mapping[str, Tensor]:
        """The averages by name, also while they are in the model; those with residuals as float32."""
        if self.swap is None or self.swap.track is not track:
            return track.recombined()
        return track.recombined(self.swap.averages_now(self.live.layout))

    def gather(self, call: str, track: Track, *, dtype: torch.dtype | None) -> Iterator[tuple[str, Any]]:
        """See `ShardedEMA.gather`. Prepares at once, and not only when the first entry is read.

        Args:
            call: the user's call, for messages.
        """
        self.prepare(call, collective=self.live.has_sharded_averages)
        entries = gather(self.live.layout, self.averages_now(track), dtype=dtype, is_destination=self.live.is_first)
        return self._checked_entries(entries, self.swap, self.tracks.update_calls)

    def _checked_entries(
        self, entries: Iterator[tuple[str, Any]], swap: Swap | None, update_calls: int
    ) -> Iterator[tuple[str, Any]]:
        for entry in entries:
            if self.swap is not swap:
                raise RuntimeError("swapped() was entered or left while gather() was under way; exhaust it before that")
            if self.tracks.update_calls != update_calls:
                raise RuntimeError("update() was called while gather() was under way; exhaust it before that")
            yield entry

    @contextmanager
    def swapped(self, track: Track) -> Iterator[nn.Module]:
        """See `ShardedEMA.swapped`."""
        if self.swap is not None:
            raise RuntimeError(
                "the averages are in the model already: leave swapped() before entering it again, "
                "or call restore() on every rank if they could not leave it together"
            )
        self._prepare_to_enter("swapped()", only_if_moved=False)
        if self.live.has_split_averages:
            self.live.check_replicas("swapped()")
        self.swap = Swap(self.live.layout, track)
        try:
            yield self.live.layout.model
        finally:
            self.restore()

    @contextmanager
    def serving(self, track: Track) -> Iterator[nn.Module]:
        """See `ShardedEMA.serving`."""
        self._prepare_to_enter("serving()", only_if_moved=True)
        serving = self.get_serving(track)
        if reason := serving.reason_to_swap:
            if track not in self._warned:
                self._warned.add(track)
                warnings.warn(f"serving() swaps the averages into the model: {reason}", stacklevel=4)
            with torch.no_grad(), self.swapped(track) as model:
                yield model
        else:
            with serving.activate() as model:
                yield model

    def get_serving(self, track: Track) -> Serving:
        """The serving of ``track`` for the current layout, cached."""
        serving = self._servings.get(track)
        if serving is None or (serving.layout is not self.live.layout and not serving.is_active):
            serving = self._servings[track] = Serving(self.live.layout, track)
        return serving

    @in_normal_mode  # also when an abandoned block ends where it is collected
    def restore(self) -> None:
        """Put the live weights back, whatever has happened to the model, and raise any error only after that."""
        if self.swap is None:
            return
        if self.live.has_split_averages:
            try:
                self.live.rendezvous("leaving swapped()")
            except RuntimeError as error:
                hint = "The averages are still in the model; restore() on every rank puts the live weights back"
                raise RuntimeError(f"{error}. {hint}") from error
        self.live.layout.abandon_pass()
        problem = self.live.refresh()
        self.tracks.bind_layout(self.live.layout)
        written = self.swap.leave(self.live.layout)
        self.swap = None
        if problem:
            raise problem
        if written:
            raise RuntimeError(
                f"parameters were written to inside swapped(): {abbreviated(written)}. The live weights are back, but "
                "what was written is in the averages now; load them from a checkpoint, and train outside swapped()"
            )

    def require_inactive(self, call: str) -> None:
        """Raise RuntimeError inside `swapped` or `serving`."""
        if self.swap is not None:
            raise RuntimeError(f"{call} inside swapped(): the model holds the averages there; call it after the block")
        if any(serving.is_active for serving in self._servings.values()):
            raise RuntimeError(f"{call} inside serving(): the model reads the averages there; call it after the block")

    def _prepare_to_enter(self, call: str, *, only_if_moved: bool) -> None:
        self.require_inactive(call)
        if active_swaps(self.live.layout.model):
            raise RuntimeError("another ShardedEMA has its averages in this model: leave its swapped() first")
        if active_servings(self.live.layout.model):
            raise RuntimeError("another ShardedEMA serves this model: leave its serving() first")
        self.prepare(call, collective=self.live.has_split_averages, only_if_moved=only_if_moved)
