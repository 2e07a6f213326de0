"""The exponential moving average of a model's weights, sharded as the model is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ema_dist.averages.construction import construct_on_all_ranks, describe_settings
from ema_dist.averages.full_weights import collect, copy_into, full_shapes, gather_pipeline, scatter
from ema_dist.averages.live_model import LiveModel
from ema_dist.averages.offload import Offloaded
from ema_dist.averages.optimizer_hook import OptimizerHook
from ema_dist.averages.precision import Compensated, Precision, Stochastic
from ema_dist.averages.state import load_state, make_state
from ema_dist.averages.tracks import BufferPolicy, Tracks
from ema_dist.averages.updates import Updates
from ema_dist.communication.call_history import CallHistory
from ema_dist.communication.rendezvous import agree_on
from ema_dist.evaluation.model_with_averages import ModelWithAverages
from ema_dist.evaluation.swap import require_live_weights
from ema_dist.modes import in_normal_mode, public_calls_in_normal_mode
from ema_dist.schedules.clock import Clock
from ema_dist.schedules.decay import DEFAULT_TRACK, HalfLife, as_decays
from ema_dist.sharding import Layout, ReplicaPolicy


@public_calls_in_normal_mode
class ShardedEMA:
    """The exponential moving average (EMA) of a model's weights, kept as shards beside the live ones on every rank.

    The layout is read from the model: plain, DDP, FSDP1, FSDP2 (``fully_shard``), HSDP or tensor parallel, compiled or
    with activation checkpointing. Wrap the model and move it to its device first.

    Args:
        model: the model to average.
        decay: `HalfLife` in optimizer steps, or the factor of the old average at each update, in [0, 1]; or a mapping
            from names to these, for several averages of one model, called tracks.
        start: until this optimizer step the average equals the live weights.
        update_interval: average every k-th optimizer step; a `HalfLife` accounts for it, a factor does not.
        dtype: dtype of the averages. None: float32 for weights narrower than float32, else the dtype of the weight.
        rounding: rounding of bfloat16 averages (``dtype=torch.bfloat16``): `Stochastic` or `Compensated`.
        replicas: ``"shard"`` splits the averages of replicated weights (DDP, HSDP) among the replicas, ``"copy"``
            stores them in full on each. A process group gives the ranks over which an unwrapped model is replicated.
        buffers: ``"average"`` or ``"copy"`` for floating buffers; integer buffers are always copied. Non-persistent
            buffers are ignored.
        select: ``(name, parameter) -> bool``; None selects the parameters that require a gradient.
        kernel: the kernel of updates: ``"foreach"``, ``"scratch"``, ``"compiled"`` (by this machine's C compiler) or
            ``"triton"``; None for the fastest one, which compiles nothing on a CPU and may be Triton's on a GPU.
        store: `Offloaded` to store the averages in CPU memory; None to store them on the device of the live weights.
        timeout: seconds that ranks wait for each other before a collective call fails, and on leaving `swapped`.

    Collective: construction, over all ranks that hold the model: compares settings and selected parameters, and if
        averages are split among replicas, the weights. Pass the unwrapped module to average on one rank.
    Memory: for each track one average per selected parameter's shard, or 1/R of it if R replicas split it; and the
        memory of ``store``. While kernels are measured, at most 64 MiB for each track and as much for the live weights.
    Raises: ValueError for a setting out of range, a model on the meta device, or when nothing is selected;
        RuntimeError when ranks differ in a setting, in what they select or in the weights of replicas, or are absent.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: HalfLife | float | Mapping[str, HalfLife | float] = HalfLife(1000),  # noqa: B008 - frozen
        start: int = 0,
        update_interval: int = 1,
        dtype: torch.dtype | None = None,
        rounding: Stochastic | Compensated = Stochastic(),  # noqa: B008 - frozen
        replicas: ReplicaPolicy = "shard",
        buffers: BufferPolicy = "average",
        select: Callable[[str, Tensor], bool] | None = None,
        kernel: str | None = None,
        store: Offloaded | None = None,
        timeout: float = 60.0,
    ) -> None:
        precision = Precision(dtype, rounding)
        self._clock = Clock(as_decays(decay), start=start, interval=update_interval)
        self._optimizer_hook: OptimizerHook | None = None
        live = LiveModel(model, replicas=replicas, select=select, timeout=timeout)
        settings = describe_settings(
            self._clock, precision, replicas=replicas, buffers=buffers, kernel=kernel, store=store, timeout=timeout
        )
        agree = agree_on if live.has_replicated_averages else None
        make = partial(Tracks, precision=precision, buffers=buffers, kernel=kernel, agree=agree, store=store)

        def make_tracks() -> Tracks:
            require_live_weights(model, "ShardedEMA(model)")
            return make(live.layout, [*self._clock.decays], live.select_parameters())

        tracks = construct_on_all_ranks(live, settings, make_tracks)
        self._updates = Updates(self._clock, live, tracks)
        self._model_with_averages = ModelWithAverages(live, tracks, self._updates)

    @property
    def model(self) -> nn.Module:
        """The module given to the constructor."""
        return self._live.layout.model

    @property
    def tracks(self) -> list[str]:
        """The names of the averages; ``["default"]`` for a single one."""
        return [*self._tracks]

    @property
    def steps(self) -> int:
        """Optimizer steps seen, without those that a gradient scaler skipped. May wait for the device."""
        return self._clock.steps

    @property
    def updates(self) -> int:
        """Averages taken, not counting the steps until ``start``. May wait for the device."""
        return self._clock.updates

    def update(self, *, found_inf: Tensor | None = None) -> None:
        """Update the averages from the live weights; call it after each optimizer step. Never waits for the device.

        With ``store=Offloaded()`` it waits for earlier updates when too many are pending.

        Args:
            found_inf: a gradient scaler's tensor, on its device: if not zero, the step was skipped and is not counted.

        Collective: no.
        Memory: nothing where dtypes are equal, else a constant scratch.
        Raises: RuntimeError inside `swapped` or `serving`, and when an earlier update failed with ``store=Offloaded()``
            or was interrupted and cannot be finished; ValueError when the model has changed.
        """
        self._update(found_inf, overlap=False)

    @in_normal_mode
    def _update(self, found_inf: Tensor | None, *, overlap: bool) -> None:
        self._model_with_averages.require_inactive("update()")
        self._model_with_averages.prepare_update()
        self._updates.update(found_inf, overlap=overlap)

    def attach(self, optimizer: Optimizer, *, overlap: bool = False) -> OptimizerHook:
        """Update after each real step of ``optimizer``, until ``remove()`` of the returned handle.

        Not counted are steps that a gradient scaler makes a fused optimizer skip on the device, and the dummy steps by
        which ``torch.distributed.checkpoint`` initializes the state of an optimizer.

        Args:
            overlap: run the update on a side stream of the GPU, concurrent with the next forward and backward pass. The
                next step of any optimizer and every call of this object wait for it; other code must not write to
                parameters before that. No effect on a CPU.

        Collective: no.
        Raises: RuntimeError when an optimizer is attached already: with several, attach the one that steps last.
            ValueError when this one steps none of the averaged parameters.
        """
        if self._optimizer_hook is not None and self._optimizer_hook.is_active:
            raise RuntimeError("an optimizer is attached already; remove() its handle first, or call update() yourself")
        self._model_with_averages.prepare("attach()", collective=False)
        stepped_ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        averaged = (self._live.layout.parameters[name] for name in self._live.selected)
        if not any(id(owner) in stepped_ids for shard in averaged for owner in shard.owners.values()):
            raise ValueError(
                "this optimizer steps none of the averaged parameters (was it built before the model was wrapped?); "
                "attach the one that does, or call update() after its steps"
            )
        self._optimizer_hook = OptimizerHook(
            optimizer,
            lambda found_inf: self._update(found_inf, overlap=overlap),
            before_steps=self._tracks.streams.join if overlap else None,
        )
        return self._optimizer_hook

    def swapped(self, track: str | None = None) -> AbstractContextManager[nn.Module]:
        """Inside the ``with`` block the model holds its averages; after it the live weights are back, bit-identical.

        They come back when the block returns and when it raises. Inside, buffers may be written (``update_bn``), and
        the written values stay in the averages. Parameters may not be written. A graph built before the block cannot
        run backward inside or after it: autograd raises, because its weights were written to.

        Args:
            track: the track to swap in; None for the only one, or the one called ``default``.

        Collective: entering and leaving, if averages are split among replicas (the default under DDP, HSDP, and for
            tensor-parallel parameters placed ``Replicate()``). Never with ``replicas="copy"``, so that one rank may
            evaluate alone under DDP.
        Memory: at most 64 MiB; for averages of another dtype or device, one live shard on the device of the average.
        Raises: RuntimeError when averages are in the model already, when ranks do not arrive within ``timeout`` or have
            made different calls, when replicas differ, and on leaving, when parameters were written to or the block of
            another rank raised. ValueError for an unknown track, when the model has changed, or
            when a parameter without an average became trainable.
        """
        return self._model_with_averages.swapped(self._tracks.resolve(track))

    def serving(self, track: str | None = None) -> AbstractContextManager[nn.Module]:
        """Forward passes in the ``with`` block read the averages, without gradients; the live weights stay in place.

        For a teacher, the block may lie between a forward pass and its backward: the gradients are bit-identical.
        Inside, the model's ``state_dict()`` returns the live weights, and buffers are copies: values written to them
        are dropped. For models that cannot be served (FSDP1, CUDA graphs) it warns and uses `swapped`.

        Args:
            track: the track to serve; None for the only one, or the one called ``default``.

        Collective: entering, if averages are split among replicas; leaving, only with `swapped`.
        Memory: the buffers; and if `serving_mode` says so, a copy of this rank's live shards, in full on each replica.
        Raises: RuntimeError inside `swapped` or `serving`, when ranks do not arrive within ``timeout``, and on leaving,
            when parameters were written to. ValueError as `swapped`.
        """
        return self._model_with_averages.serving(self._tracks.resolve(track))

    @property
    def call_history(self) -> CallHistory:
        """The calls that every rank must make in the same order; ranks compare them whenever they communicate."""
        return self._live.history

    @property
    def update_kernel(self) -> str:
        """The names of the kernels that update averages of parameters: the fastest here, unless ``kernel`` was given.

        "foreach" reads the live weights once for each track, the others once for all tracks.
        """
        return " and ".join(self._tracks.kernel_names)

    @property
    def serving_mode(self) -> str:
        """What forward passes read inside `serving`; if it differs between parameters, the costliest.

        One of "the averages themselves", "a cast copy" (dtypes differ), "a copy on the model's device" (the averages
        are on another one), "a gathered copy" (replicas split the averages), or "swapped(), since" and the reason.
        """
        return self._model_with_averages.get_serving(next(iter(self._tracks.values()))).mode

    def restore(self) -> None:
        """Leave `swapped` early, or after an interruption, or after ranks could not leave it together.

        Collective: as `swapped`. Memory: as `swapped`. Raises: as `swapped` on leaving.
        """
        self._model_with_averages.restore()

    def check_replicas(self) -> None:
        """Compare the live weights of replicas (DDP, HSDP), by checksums of their bits.

        Collective: over all ranks that hold the model. Memory: 16 bytes per tensor.
        Raises: RuntimeError with the names of the tensors that differ, and the ranks on which they differ.
        """
        self._model_with_averages.prepare("check_replicas()", collective=True)
        self._live.check_replicas("check_replicas()")

    def state_dict(self, *, for_loading: bool = False) -> dict[str, Any]:
        """The averages and counts as `torch.distributed.checkpoint` (DCP) saves and reshards them.

        The tensors share storage with the averages, so that DCP loads into them; DCP compares only names before that.
        Inside `swapped`, and for `Compensated` averages, they are copies, which `load_state_dict` copies back.

        Args:
            for_loading: whether the state is only loaded into; ranks that have made different calls are then allowed.

        Collective: a rendezvous of all ranks that hold the model, if several hold parts of its averages.
        Shape: ``{"format": 1, "steps": int, "updates": int, "tracks": {track: {"decay": {...}, "averages": {name:
            tensor}, "buffers": {name: tensor}}}}``, under first canonical names.
        Raises: RuntimeError when ranks have made different calls or are absent; ValueError when the model has changed.
        """
        self._model_with_averages.prepare(
            "state_dict()",
            collective=self._live.has_sharded_averages,
            for_loading=for_loading,
            compared=lambda: [] if for_loading else self.call_history.compared(steps=self.steps, updates=self.updates),
        )
        averages = self._model_with_averages.averages_to_save()
        return make_state(self._clock, self._live.layout, self._tracks, averages)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`: of this layout, resharded by DCP, or with full tensors.

        The decay given to the constructor stays; a different one in ``state_dict`` causes a warning.

        Collective: no.
        Raises: RuntimeError inside `swapped`; ValueError before any change when format, tracks, names or shapes differ.
        """
        self._model_with_averages.require_inactive("load_state_dict()")
        self._model_with_averages.prepare("load_state_dict()", collective=False, for_loading=True)
        load_state(state_dict, self._clock, self._live.layout, self._tracks)
        self._updates.start_from("load_state_dict()")

    def gather(self, *, dtype: torch.dtype | None = None, track: str | None = None) -> Iterator[tuple[str, Any]]:
        """The entries of `full_state_dict` one by one: (name, CPU tensor) on the first rank, (name, None) elsewhere.

        Collective: over all ranks that hold the model, if several hold parts of its averages; all must exhaust it.
        Memory: one full tensor; on the first rank beyond those it has yielded.
        """
        return self._model_with_averages.gather("gather", self._tracks.resolve(track), dtype=dtype)

    def full_state_dict(
        self, *, dtype: torch.dtype | None = None, track: str | None = None, pipeline: ProcessGroup | None = None
    ) -> dict[str, Any]:
        """The averaged model on the first rank, ``{}`` elsewhere; ``load_state_dict(..., strict=True)`` accepts it.

        It contains frozen parameters, tied names, buffers and extra states, too. If each rank holds an unwrapped model
        of its own, each rank gets its own dictionary. With pipeline parallelism and without ``pipeline``, the first
        rank of each stage gets the modules of that stage.

        Args:
            dtype: dtype of floating tensors; None for the dtype of each live tensor.
            track: the track to gather; None for the only one, or the one called ``default``.
            pipeline: a process group with one rank of each pipeline stage; its first rank gets the entries of all.

        Collective: over all ranks that hold the model, if several hold parts of its averages; over ``pipeline``.
        Memory: the result and one more full tensor on the first rank, one full tensor elsewhere.
        Shape: full tensors, contiguous, on the CPU; tied names share one tensor.
        Raises: RuntimeError when ranks do not arrive within ``timeout``; ValueError when the model has changed, or when
            stages hold different tensors under one name.
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
        self.call_history.record(call)

    def copy_to(self, model: nn.Module, *, track: str | None = None) -> None:
        """Overwrite the weights of ``model`` with the averages, and the rest of its state with that of the live model.

        Args:
            model: the one given at construction, one wrapped the same way, or an unwrapped one on every rank.
            track: the track to copy; None for the only one, or the one called ``default``.

        Collective: over all ranks that hold the model, if several hold parts of its averages.
        Memory: one full tensor on each rank.
        Raises: RuntimeError inside `swapped`; ValueError when names or shapes differ, before anything changes.
        """
        resolved_track = self._tracks.resolve(track)
        call = self._model_with_averages.describe_call("copy_to", resolved_track)
        self._model_with_averages.require_inactive(call)
        self._model_with_averages.prepare(call, collective=self._live.has_sharded_averages)
        copy_into(Layout(model, "copy"), self._live.layout, resolved_track.recombined())

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a ShardedEMA follows one model where it is, and cannot be copied or pickled: take its state_dict() or "
            "full_state_dict(), and construct another one for another model"
        )

    def __repr__(self) -> str:
        parameters = next(iter(self._tracks.values())).parameters
        numel = sum(average.numel() for average in parameters.values())
        decays = self._clock.decays
        return (
            f"{type(self).__name__}({len(parameters)} parameters, {numel:,} elements on this rank, "
            f"{decays[DEFAULT_TRACK] if [*decays] == [DEFAULT_TRACK] else decays}, start={self._clock.start}, "
            f"update_interval={self._clock.interval}, update_kernel={self.update_kernel}, "
            f"serving_mode={self.serving_mode}{f', {self._tracks.store}' if self._tracks.store else ''})"
        )

    @property
    def moves_by(self) -> str:
        """Deprecated, and removed in the next version: use `update_kernel`."""
        return self._read_renamed("moves_by", "update_kernel")

    @property
    def serves_by(self) -> str:
        """Deprecated, and removed in the next version: use `serving_mode`."""
        return self._read_renamed("serves_by", "serving_mode")

    def _read_renamed(self, old: str, new: str) -> str:
        warnings.warn(f"ShardedEMA.{old} was renamed: use ShardedEMA.{new}", DeprecationWarning, stacklevel=4)
        return getattr(self, new)

    @property
    def _live(self) -> LiveModel:
        return self._model_with_averages.live

    @property
    def _tracks(self) -> Tracks:
        return self._model_with_averages.tracks
