"""The methods of `ShardedEMA` that save, load, gather and copy averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ema_dist.averages.consolidated import gather_state, scatter_state
from ema_dist.averages.distance import relative_distance
from ema_dist.averages.full_weights import collect, copy_into, full_shapes, gather_pipeline, scatter
from ema_dist.averages.live_model import LiveModel
from ema_dist.averages.state import ShardedState, load_state, make_state
from ema_dist.averages.tracks import Tracks
from ema_dist.averages.updates import Updates
from ema_dist.communication.call_history import CallHistory
from ema_dist.evaluation.model_with_averages import ModelWithAverages
from ema_dist.modes import public_calls_in_normal_mode
from ema_dist.schedules.clock import Clock
from ema_dist.sharding import Layout


@public_calls_in_normal_mode
class StateMethods:
    """The part of `ShardedEMA` that saves, loads, gathers and scatters."""

    _clock: Clock
    _updates: Updates
    _model_with_averages: ModelWithAverages

    @property
    def _live(self) -> LiveModel:
        return self._model_with_averages.live

    @property
    def _tracks(self) -> Tracks:
        return self._model_with_averages.tracks

    @property
    def steps(self) -> int:
        """Number of optimizer steps, excluding those that a gradient scaler skipped. May wait for the device."""
        return self._clock.steps

    @property
    def updates(self) -> int:
        """Number of updates, excluding steps up to ``start``, which copy the live weights. May wait for the device."""
        return self._clock.updates

    @property
    def time(self) -> float:
        """Elapsed time, in steps, or in the samples or tokens of ``elapsed``. May wait for the device."""
        return self._clock.time

    def initial_mass(self, track: str | None = None) -> float:
        """The share of an average, in [0, 1], that is still the weights at which averaging began.

        It is the product of all decays since then. It is 1 up to ``start``, while steps copy the live weights.

        Args:
            track: the track; None for the only one, or the one called ``default``.

        Collective: no. May wait for the device. Raises: ValueError for an unknown track.
        """
        return self._clock.initial_mass(self._tracks.resolve_name(track))

    def metrics(self) -> dict[str, float]:
        """Numbers to log: ``ema/steps``, ``ema/time``; per track ``ema/<track>/decay``, ``ema/<track>/initial_mass``.

        The decay is the one of the last update. It is 0 up to ``start``, while steps copy the live weights.

        Collective: no. May wait for the device.
        """
        metrics = {"ema/steps": self.steps, "ema/time": self.time}
        for track in self._tracks:
            metrics[f"ema/{track}/decay"] = self._clock.last_decay(track)
            metrics[f"ema/{track}/initial_mass"] = self._clock.initial_mass(track)
        return metrics

    def distance(self, track: str | None = None) -> float:
        """``|average - live| / |live|`` in the Euclidean norm over the averaged parameters, in float64.

        In a healthy run it is small, and shrinks with the learning rate. Buffers are excluded. On MPS it is computed in
        float32.

        Args:
            track: the track; None for the only one, or the one called ``default``.

        Collective: one all-reduce over all ranks that hold the model, if several hold parts of its averages. Waits for
            the device. Memory: a few float64 copies of this rank's part of one parameter.
        Raises: RuntimeError inside `swapped` or `serving`, and when ranks do not arrive; ValueError for an unknown
            track, or when the model has changed.
        """
        resolved_track = self._tracks.resolve(track)
        call = self._model_with_averages.describe_call("distance", resolved_track)
        self._model_with_averages.require_inactive(call)
        self._model_with_averages.prepare(call, collective=self._live.has_sharded_averages)
        averages = resolved_track.recombined(resolved_track.parameters)
        return relative_distance(self._live.layout, averages, is_collective=self._live.has_sharded_averages)

    def reset(self) -> None:
        """Restart from the live weights.

        Copies them into the averages, and sets steps, updates and time to 0 and the initial mass to 1. Call it after
        loading weights into the model.

        Collective: no; each rank that holds the model must call it. Memory: one cast tensor where dtypes differ.
        Raises: RuntimeError inside `swapped` or `serving`; ValueError when the model has changed.
        """
        self._model_with_averages.require_inactive("reset()")
        self._model_with_averages.prepare("reset()", collective=False, for_loading=True)
        self._live.layout.wait_for_device()
        self._tracks.copy_live(self._live.layout)
        self._clock.reset()
        self._model_with_averages.start_from("reset()")

    @property
    def call_history(self) -> CallHistory:
        """The calls that every rank must make in the same order; ranks compare them whenever they communicate."""
        return self._live.history

    def state_dict(self, *, for_loading: bool = False) -> dict[str, Any]:
        """The averages and counts, in the form that `torch.distributed.checkpoint` (DCP) saves and reshards.

        The tensors share storage with the averages, so DCP loads into the averages; it compares only names before that.
        Inside `swapped`, and for `Compensated` averages, they are copies, which `load_state_dict` copies back. If
        several ranks hold parts of the averages, the state cannot be pickled: see `consolidated_state_dict`.

        Args:
            for_loading: whether the state is only a target to load into; ranks may then have made different calls.

        Collective: a rendezvous of all ranks that hold the model, if several hold parts of its averages.
        Shape: ``{"format": 1, "steps": int, "updates": int, "tracks": {track: {"decay": {...}, "averages": {name:
            tensor}, "buffers": {name: tensor}}}}``, under first canonical names.
        Raises: RuntimeError when ranks have made different calls or are absent; ValueError when the model has changed.
        """
        self._model_with_averages.prepare(
            "state_dict()",
            collective=self._live.has_sharded_averages,
            for_loading=for_loading,
            compared=list if for_loading else self._compared_calls,
        )
        averages = self._model_with_averages.averages_to_save()
        if not for_loading:
            self._model_with_averages.initial_weights.prepare_to_save()
        return make_state(
            self._clock,
            self._live.layout,
            self._tracks,
            convert=lambda shard, track, name: shard.wrap(averages[track][name]),
            make_dict=ShardedState if self._live.has_sharded_averages else dict,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state from `consolidated_state_dict`, or from `state_dict` (same sharding, or resharded by DCP).

        Keeps the schedule given to the constructor; the first rank warns if ``state_dict`` has a different one.

        Collective: no.
        Raises: RuntimeError inside `swapped`; ValueError before any change when format, tracks, names or shapes differ,
            or when the state holds another rank's shards.
        """
        self._model_with_averages.require_inactive("load_state_dict()")
        self._model_with_averages.prepare("load_state_dict()", collective=False, for_loading=True)
        hint = "consolidated_state_dict() returns {} on all ranks but the first"
        self._load_state(state_dict, "load_state_dict()", empty_hint=hint)

    def consolidated_state_dict(self) -> dict[str, Any]:
        """The state with full averages on the first rank, which ``torch.save`` can write; ``{}`` elsewhere.

        Collective: over all ranks that hold the model, if several hold parts of its averages.
        Memory: the result, and one full tensor. Shape: as `state_dict`, with full tensors on the CPU.
        Raises: as `state_dict`.
        """
        self._model_with_averages.prepare(
            "consolidated_state_dict()", collective=self._live.has_sharded_averages, compared=self._compared_calls
        )
        averages = {name: self._model_with_averages.averages_now(track) for name, track in self._tracks.items()}
        self._model_with_averages.initial_weights.prepare_to_save()
        return gather_state(self._clock, self._live.layout, self._tracks, averages, is_destination=self._live.is_first)

    def load_consolidated_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the `consolidated_state_dict` that the first rank passes; ``state`` is ignored on other ranks.

        If every rank has read the file, `load_state_dict` loads the same state without communication.

        Collective: over all ranks that hold the model. Memory: one full tensor, and a copy of this rank's averages.
        Raises: as `load_state_dict`, on every rank; RuntimeError when ranks do not arrive, or ``state`` is unreadable.
        """
        self._model_with_averages.require_inactive("load_consolidated_state_dict()")
        self._model_with_averages.prepare(
            "load_consolidated_state_dict()", collective=True, for_loading=True, compared=list
        )
        hint = "pass what consolidated_state_dict() returned on the first rank"
        scattered = scatter_state(self._live.layout, state)
        self._load_state(scattered, "load_consolidated_state_dict()", empty_hint=hint)

    def _compared_calls(self) -> Sequence[Mapping[str, str]]:
        return self.call_history.compared(steps=self.steps, updates=self.updates, time=self.time)

    def _load_state(self, state: Mapping[str, Any], call: str, *, empty_hint: str) -> None:
        load_state(
            state, self._clock, self._live.layout, self._tracks, empty_hint=empty_hint, warns=self._live.is_first
        )
        self._model_with_averages.start_from(call)

    def gather(self, *, dtype: torch.dtype | None = None, track: str | None = None) -> Iterator[tuple[str, Any]]:
        """The entries of `full_state_dict` one by one: (name, CPU tensor) on the first rank, (name, None) elsewhere.

        Args:
            dtype: dtype of floating tensors; None for the dtype of each live tensor.
            track: the track to gather; None for the only one, or the one called ``default``.

        Collective: over all ranks that hold the model, if several hold parts of its averages; each rank must exhaust
            the iterator.
        Memory: one full tensor, besides those already yielded.
        Raises: RuntimeError when ranks do not arrive within ``timeout``; ValueError for an unknown track, when the
            model has changed, or for a sharded tensor subclass.
        Warns: InitialWeightsWarning if more than 10 % of the average is still the initial weights.
        """
        return self._model_with_averages.gather("gather", self._tracks.resolve(track), dtype=dtype)

    def full_state_dict(
        self, *, dtype: torch.dtype | None = None, track: str | None = None, pipeline: ProcessGroup | None = None
    ) -> dict[str, Any]:
        """The averaged model on the first rank, ``{}`` elsewhere; ``load_state_dict(..., strict=True)`` accepts it.

        It also contains frozen parameters, tied names, buffers and extra states. If each rank holds its own unwrapped
        model, each rank gets its own dictionary. With pipeline parallelism and without ``pipeline``, the first rank of
        each stage gets the modules of that stage.

        Args:
            dtype: dtype of floating tensors; None for the dtype of each live tensor.
            track: the track to gather; None for the only one, or the one called ``default``.
            pipeline: a process group with one rank of each pipeline stage; its first rank gets the entries of all
                stages.

        Collective: over all ranks that hold the model, if several hold parts of its averages; and over ``pipeline``.
        Memory: the result and one more full tensor on the first rank, one full tensor elsewhere.
        Shape: full tensors, contiguous, on the CPU; tied names share one tensor.
        Raises: RuntimeError when ranks do not arrive within ``timeout``; ValueError when the model has changed, or when
            stages hold different tensors under the same name.
        Warns: InitialWeightsWarning if more than 10 % of the average is still the initial weights.
        """
        entries = self._model_with_averages.gather("full_state_dict", self._tracks.resolve(track), dtype=dtype)
        if pipeline is not None:
            entries = gather_pipeline(entries, self._live.layout, pipeline, timeout=self._live.timeout)
        return collect(entries, is_destination=self._live.is_first)

    def full_shapes(self, *, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        """The entries of `full_state_dict` as tensors on the meta device; None for extra states that are not tensors.

        Collective: no.
        """
        return full_shapes(self._live.layout, dtype=dtype)

    def load_full_state_dict(self, full: Mapping[str, Any], *, track: str | None = None) -> None:
        """Scatters full averages from the first rank to all ranks; the inverse of `full_state_dict`.

        Live weights, frozen parameters and step counts do not change. ``full`` is ignored on other ranks. Values are
        read twice, one at a time, so ``full`` may be a mapping that reads tensors from files on access.

        Collective: over all ranks that hold the model. Memory: one full tensor on each rank.
        Raises: RuntimeError inside `swapped`, and on every rank when a value cannot be read; ValueError on every rank
            when names, shapes or kinds of dtype differ, before anything changes.
        """
        resolved_track = self._tracks.resolve(track)
        call = self._model_with_averages.describe_call("load_full_state_dict", resolved_track)
        self._model_with_averages.require_inactive(call)
        self._model_with_averages.prepare(call, collective=True)
        scatter(self._live.layout, resolved_track, full)
        self._tracks.bind_loaded(self._live.layout)
        self._model_with_averages.initial_weights.begin(are_loaded=True)
        self.call_history.record(call)

    def copy_to(self, model: nn.Module, *, track: str | None = None) -> None:
        """Overwrite the weights of ``model`` with the averages, and the rest of its state with that of the live model.

        Args:
            model: the one given at construction, one wrapped the same way, or an unwrapped one on every rank.
            track: the track to copy; None for the only one, or the one called ``default``.

        Collective: over all ranks that hold the model, if several hold parts of its averages.
        Memory: one full tensor on each rank.
        Raises: RuntimeError inside `swapped`; ValueError when names or shapes differ, before anything changes.
        Warns: InitialWeightsWarning if more than 10 % of the average is still the initial weights.
        """
        resolved_track = self._tracks.resolve(track)
        call = self._model_with_averages.describe_call("copy_to", resolved_track)
        self._model_with_averages.require_inactive(call)
        self._model_with_averages.prepare(call, collective=self._live.has_sharded_averages, used_track=resolved_track)
        writes = self._model_with_averages.initial_weights.writes
        writes.pause()  # these writes make the weights equal to the averages if ``model`` is the live model
        try:
            copy_into(Layout(model, "copy"), self._live.layout, resolved_track.recombined())
        finally:
            writes.resume()
