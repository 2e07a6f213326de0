"""A live model and its averages: keeps them consistent with each other, and swaps, serves and gathers the averages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ema_dist.averages.full_weights import gather
from ema_dist.averages.initial_weights import InitialWeights
from ema_dist.averages.live_model import LiveModel
from ema_dist.averages.live_writes import all_writes_to
from ema_dist.averages.track import Track
from ema_dist.averages.tracks import Tracks
from ema_dist.averages.updates import Updates
from ema_dist.evaluation.block import EvaluationBlock, leave_after
from ema_dist.evaluation.serving import Serving, active_servings
from ema_dist.evaluation.split_swap import announce_broken_swap, enter_together, leave_together
from ema_dist.evaluation.swap import Swap, SwapStage, require_live_weights
from ema_dist.messages import abbreviated, add_note
from ema_dist.modes import iterate_in_normal_mode
from ema_dist.signals import deferred_signals


class ModelWithAverages:
    """The ``live`` model and the averages of ``tracks``; at most one swap or serving is active at a time."""

    def __init__(self, live: LiveModel, tracks: Tracks, updates: Updates, initial_weights: InitialWeights) -> None:
        self.live = live
        self.tracks = tracks
        self._updates = updates
        self.initial_weights = initial_weights
        self._swap: Swap | None = None
        self._servings: dict[Track, Serving] = {}
        self._warned: set[Track] = set()
        """Tracks for which `serving` has already warned that it swaps."""

    @property
    def swap(self) -> Swap | None:
        """The active swap; None while the model holds its live weights."""
        return None if self._swap is None or self._swap.stage is SwapStage.DONE else self._swap

    def prepare(
        self,
        call: str,
        *,
        collective: bool,
        for_serving: bool = False,
        compared: Callable[[], Sequence[Mapping[str, str]]] | None = None,
        for_loading: bool = False,
        used_track: Track | None = None,
    ) -> None:
        """Finish pending updates, refresh the layout, and bind the averages to it; see `LiveModel.prepare`.

        Args:
            compared: called after pending updates are finished; returns the values that ranks compare.
            for_loading: whether other averages will be loaded, so that an interrupted update need not be finished.
            used_track: the averages that ``call`` uses as the model's weights, to warn if they are the initial ones.
        """
        self._require_not_capturing(call)
        self._require_unbroken()
        problem = None
        if self.swap is not None and self.swap.stage is not SwapStage.INSIDE:
            problem = RuntimeError("swapped() was interrupted: call restore() on every rank first")
        try:
            self._updates.finish()
        except RuntimeError as error:
            problem = problem or (None if for_loading else error)
        try:
            self.tracks.drain()
        except RuntimeError as error:  # reported to the other ranks, which would otherwise wait for this one
            problem = problem or error
        try:
            self.live.prepare(
                call,
                collective=collective,
                for_serving=for_serving,
                problem=problem,
                check=None if for_loading else partial(self._check_initial_weights, call, used_track),
                compared=compared() if compared else None,
            )
        finally:
            if not self.tracks.is_bound_to(self.live.layout):
                self.tracks.bind_layout(self.live.layout)

    def prepare_update(self) -> None:
        """A cheap `prepare` for each step: refreshes the layout only if a tensor has moved, and waits for no update.

        Raises: ValueError when the model has changed; RuntimeError while a CUDA graph is captured.
        """
        self._require_not_capturing("update()")
        self._updates.finish()
        self.live.require_not_wrapped_in_ddp("update()")
        if self.live.layout.has_moved() or not self.tracks.is_bound_to(self.live.layout):
            self.prepare("update()", collective=False)
        elif self.live.layout.refresh_buffers():
            self._servings.clear()  # a cached serving would put the old buffers back on leaving
            self.tracks.bind_buffers(self.live.layout)

    def start_from(self, call: str) -> None:
        """Record that ``call`` has replaced the averages and the clock."""
        self._updates.start_from(call)
        self.initial_weights.begin(are_loaded=call != "reset()")

    def _check_initial_weights(self, call: str, used_track: Track | None) -> Warning | None:
        warning = self.initial_weights.check_hook()
        if used_track is None or warning is not None:
            return warning
        name = self._name_of(used_track)
        return self.initial_weights.check(
            call.partition("(")[0], name, track_label=f" {name!r}" if len(self.tracks) > 1 else ""
        )

    def averages_now(self, track: Track) -> Mapping[str, Tensor]:
        """The averages by name, also while they are in the model; those with residuals as float32."""
        if self.swap is None or self.swap.track is not track:
            return track.recombined()
        return track.recombined(self.swap.averages_now(self.live.layout))

    def averages_to_save(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The averages of every track by name; copies inside a swap, else DCP would load into the model's storage."""
        current = {name: self.averages_now(track) for name, track in self.tracks.items()}
        if self.swap is None:
            return current
        return {name: self.tracks[name].without_shared_storage(averages) for name, averages in current.items()}

    def gather(self, call: str, track: Track, *, dtype: torch.dtype | None) -> Iterator[tuple[str, Any]]:
        """See `ShardedEMA.gather`. Prepares immediately, not when the first entry is read.

        Args:
            call: the name of the user's call, for messages.
        """
        self.prepare(
            self.describe_call(call, track, dtype=dtype),
            collective=self.live.has_sharded_averages,
            used_track=track,
        )
        entries = gather(self.live.layout, self.averages_now(track), dtype=dtype, is_destination=self.live.is_first)
        return iterate_in_normal_mode(self._checked_entries(entries, self.swap, self.tracks.update_calls))

    def _checked_entries(
        self, entries: Iterator[tuple[str, Any]], swap: Swap | None, update_calls: int
    ) -> Iterator[tuple[str, Any]]:
        for entry in entries:
            if self.swap is not swap:
                raise RuntimeError("swapped() was entered or left during gather(): exhaust the iterator before that")
            if self.tracks.update_calls != update_calls:
                raise RuntimeError("update() was called during gather(): exhaust the iterator before that")
            yield entry

    def swapped(self, track: Track) -> EvaluationBlock[Swap]:
        """See `ShardedEMA.swapped`."""
        return EvaluationBlock(
            self.live.layout.model, partial(self.enter_swap, track), self.leave_swap, with_gradients=True
        )

    def enter_swap(self, track: Track, *, is_checked: bool = False) -> Swap:
        """Put the averages of ``track`` into the model.

        Args:
            is_checked: whether the same call has already checked for initial weights.

        Raises: as `ShardedEMA.swapped`. The live weights are put back before, unless a second exception interrupts
            that, or an exception interrupts the fill.
        """
        if self.swap is not None:
            raise RuntimeError(
                "the averages are in the model already: leave swapped() before entering it again, "
                "or call restore() on every rank if the ranks failed to leave it together"
            )
        call = self.describe_call("swapped", track)
        used_track = None if is_checked else track
        if self.live.has_split_averages:
            try:
                with deferred_signals():
                    self._prepare_to_enter(call, used_track)
                    swap = enter_together(self.live, call, lambda: self._write_parts(track), self._undo_entering)
            except BaseException as error:  # perhaps from a signal deferred until the averages were in the model
                if self.swap is not None and self.swap.stage is SwapStage.INSIDE:
                    leave_after(error, partial(self.leave_swap, self.swap))
                raise
            return swap
        self._prepare_to_enter(call, used_track)
        try:
            swap = self._write_parts(track)
            swap.fill()
            self.live.record(call)
        except BaseException:
            self._undo_entering()
            raise
        return swap

    def leave_swap(self, swap: Swap, error: BaseException | None = None) -> None:
        """Put the live weights back; does nothing if ``swap`` has ended.

        Errors about this rank's model are raised after the live weights are back. Errors about a broken swap and about
        absent ranks are raised before.

        Args:
            error: the exception that ended the block.

        Raises: as `ShardedEMA.restore`; and when the block of another rank raised, unless this rank's block did, too.
        """
        if swap is not self.swap:
            return
        self._require_not_capturing("leaving swapped()")
        self._require_unbroken()
        problems: list[Exception] = []
        restore_parts = partial(self._restore_parts, swap, problems)
        if swap.has_filled:
            raised_in_block = leave_together(self.live, swap, error, restore_parts)
        else:
            raised_in_block = None
            restore_parts()
        self._resume_noticing_writes()
        if swap.written:
            problems.append(
                RuntimeError(
                    f"parameters were written to inside swapped(): {abbreviated(swap.written)}. The live weights are "
                    "back, but the averages now hold the written values: load the averages from a checkpoint, and "
                    "train outside swapped()"
                )
            )
        if raised_in_block and not error:
            problems.append(raised_in_block)
        if problems:
            first, *others = problems
            for other in others:
                add_note(first, f"Also: {other}")
            raise first

    def _write_parts(self, track: Track) -> Swap:
        swap = self._swap = Swap(self.live.layout, track)
        self.live.layout.wait_for_device()
        for writes in all_writes_to(self.live.layout.model):
            writes.pause()
        swap.write_parts()
        return swap

    def _undo_entering(self) -> None:
        if self._swap is not None:
            self._swap.restore_parts(self.live.layout)
            self._resume_noticing_writes()

    def _resume_noticing_writes(self) -> None:
        if self.swap is None:
            for writes in all_writes_to(self.live.layout.model):
                writes.resume()

    def _restore_parts(self, swap: Swap, problems: list[Exception]) -> None:
        self.live.layout.abandon_pass()
        if problem := self.live.refresh(only_if_moved=True):
            if self.live.layout.has_moved_parameters():
                raise RuntimeError(
                    f"{problem}. The live weights are not back, because parameters have also moved to other storage: "
                    "undo the change, then call restore() on every rank"
                )
            problems.append(problem)
        self.live.layout.wait_for_device()
        swap.restore_parts(self.live.layout)

    def serving(self, track: Track) -> EvaluationBlock[Serving | Swap]:
        """See `ShardedEMA.serving`."""
        model = self.live.layout.model
        return EvaluationBlock(model, partial(self._enter_serving, track), self._leave_serving, with_gradients=False)

    def _enter_serving(self, track: Track) -> Serving | Swap:
        call = self.describe_call("serving", track)
        self._prepare_to_enter(call, track, for_serving=True)
        serving = self.get_serving(track)
        if reason := serving.reason_to_swap:
            if track not in self._warned:
                self._warned.add(track)
                warnings.warn(f"serving() swaps the averages into the model: {reason}", stacklevel=3)
            return self.enter_swap(track, is_checked=True)
        serving.enter()
        self.live.record(call)
        return serving

    def _leave_serving(self, active: Serving | Swap, error: BaseException | None) -> None:
        if isinstance(active, Swap):
            self.leave_swap(active, error)
        else:
            active.leave()

    def get_serving(self, track: Track) -> Serving:
        """The serving of ``track`` for the current layout, cached."""
        serving = self._servings.get(track)
        if serving is None or (serving.layout is not self.live.layout and not serving.is_active):
            serving = self._servings[track] = Serving(self.live.layout, track)
        return serving

    def restore(self) -> None:
        """See `ShardedEMA.restore`."""
        for serving in self._servings.values():
            serving.leave()
        if self.swap is not None:
            self.leave_swap(self.swap)

    def _require_not_capturing(self, call: str) -> None:
        # Replays of a captured update would all use one weight and one random seed, and a captured swap would not run.
        if self.tracks.streams.is_capturing:
            raise RuntimeError(
                f"{call} while the current stream captures a CUDA graph is not supported: the graph would record the "
                "writes instead of making them, and each replay would repeat them without counting a step. Call "
                "update() after each replay, without attach(); make other calls before the capture or after a replay"
            )

    def _require_unbroken(self) -> None:
        if self.swap is not None and self.swap.is_broken:
            announce_broken_swap(self.live)
        self.live.require_unbroken()

    def describe_call(self, name: str, track: Track, *, dtype: torch.dtype | None = None) -> str:
        """The call with the arguments that must be equal on all ranks; includes the track only if there are several."""
        names = [repr(self._name_of(track))] if len(self.tracks) > 1 else []
        arguments = [*names, *([f"dtype={dtype}"] if dtype else ())]
        return f"{name}({', '.join(arguments)})"

    def _name_of(self, track: Track) -> str:
        return next(name for name, candidate in self.tracks.items() if candidate is track)

    def require_inactive(self, call: str) -> None:
        """Raise RuntimeError inside `swapped` or `serving`, or inside `swapped` of another ShardedEMA of this model."""
        if self.swap is not None:
            raise RuntimeError(f"{call} inside swapped(): the model holds the averages there; call it after the block")
        if any(serving.is_active for serving in self._servings.values()):
            raise RuntimeError(f"{call} inside serving(): the model reads the averages there; call it after the block")
        require_live_weights(self.live.layout.model, call)

    def _prepare_to_enter(self, call: str, used_track: Track | None, *, for_serving: bool = False) -> None:
        self.live.require_not_wrapped_in_ddp(call)
        self.require_inactive(call)
        if active_servings(self.live.layout.model):
            raise RuntimeError(f"{call}: another ShardedEMA serves this model; leave its serving() first")
        self.prepare(call, collective=self.live.has_split_averages, for_serving=for_serving, used_track=used_track)
