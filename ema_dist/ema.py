"""The exponential moving average of a model's weights, sharded as the model is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ema_dist.averages.construction import (
    construct_on_all_ranks,
    describe_settings,
    problems_reported,
    resolve_kernel,
    warn_of_unlikely_decays,
)
from ema_dist.averages.initial_weights import InitialWeights
from ema_dist.averages.live_model import LiveModel
from ema_dist.averages.offload import Offloaded
from ema_dist.averages.optimizer_hook import OptimizerHook, unwrap_optimizer
from ema_dist.averages.precision import Compensated, Precision, Stochastic
from ema_dist.averages.tracks import BufferPolicy, Tracks
from ema_dist.averages.updates import Updates
from ema_dist.communication.rendezvous import agree_on
from ema_dist.ema_states import StateMethods
from ema_dist.evaluation.model_with_averages import ModelWithAverages
from ema_dist.evaluation.swap import require_live_weights
from ema_dist.modes import in_normal_mode, public_calls_in_normal_mode
from ema_dist.schedules.clock import Clock
from ema_dist.schedules.decay import DEFAULT_TRACK, as_schedules
from ema_dist.schedules.laws import HalfLife
from ema_dist.schedules.schedule import Schedule
from ema_dist.sharding import ReplicaPolicy


def _renamed(old: str, new: str) -> property:
    def read(ema: ShardedEMA) -> str:
        warnings.warn(f"ShardedEMA.{old} was renamed: use ShardedEMA.{new}", DeprecationWarning, stacklevel=3)
        return getattr(ema, new)

    return property(read, doc=f"Deprecated, and removed in the next version: use `{new}`.")


@public_calls_in_normal_mode
class ShardedEMA(StateMethods):
    """The exponential moving average (EMA) of a model's weights; each rank stores a shard of it, beside live weights.

    The layout is read from the model: plain, DDP, FSDP1, FSDP2 (``fully_shard``), HSDP or tensor parallel, compiled or
    with activation checkpointing. Wrap the model and move it to its device first.

    Args:
        model: the model to average.
        decay: an averaging law: `HalfLife`, `Power`, `Uniform`, `InverseGamma`, `Warmup`, `ExponentialWarmup`,
            `Cosine` or another `Schedule`; or a constant in [0, 1] that multiplies the old average at each update; or
            a mapping from names to these, for several averages of one model, called tracks.
        start: up to this time, in steps or in the unit of ``update(elapsed=)``, the averages are copies of the live
            weights. Schedules count time from there.
        update_interval: update at every optimizer step whose number is a multiple of this. Schedules that depend on the
            elapsed time compensate for it; a constant decay does not.
        dtype: dtype of the averages. None: float32 for weights narrower than float32, else the dtype of the weight.
        rounding: rounding of bfloat16 averages (``dtype=torch.bfloat16``): `Stochastic` or `Compensated`.
        replicas: ``"shard"`` splits the averages of replicated weights (DDP, HSDP) among the replicas, ``"copy"``
            stores them in full on each. A process group gives the ranks over which an unwrapped model is replicated.
        buffers: ``"average"`` or ``"copy"`` for floating buffers; integer buffers are always copied. Non-persistent
            buffers are ignored.
        select: ``(name, parameter) -> bool``; None selects the parameters that require a gradient.
        kernel: the update kernel: ``"foreach"``, ``"scratch"``, ``"compiled"`` (by this machine's C compiler) or
            ``"triton"``. None selects the fastest one, excluding ``"compiled"``. ``"auto"``, recommended on CPUs, also
            considers ``"compiled"`` if all ranks have a working C compiler.
        store: `Offloaded` to store the averages in CPU memory; None to store them on the device of the live weights.
        timeout: seconds that ranks wait for each other in a collective call, or on leaving `swapped`, before it fails.

    Collective: construction, over all ranks that hold the model. They compare their settings and selected parameters,
        and if replicas split the averages, also the weights. Pass the unwrapped module to average on one rank only.
    Memory: for each track, one average of each selected parameter's shard, or 1/R of it if R replicas split it; and the
        memory of ``store``. While kernels are measured, at most 64 MiB (256 MiB on a GPU) for each track and as much
        for the live weights.
    Raises: TypeError for an argument of a wrong type; ValueError for a setting out of range, a model on the meta
        device, or when nothing is selected; RuntimeError when ranks have different settings, select different
        parameters or are absent, or when the weights of replicas differ.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: Schedule | float | Mapping[str, Schedule | float] = HalfLife(1000),  # noqa: B008 - frozen
        start: float = 0,
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
        self._optimizer_hook: OptimizerHook | None = None
        live = LiveModel(model, replicas=replicas, select=select, timeout=timeout)
        with problems_reported(live):
            if not isinstance(replicas, ProcessGroup) and replicas not in ("shard", "copy"):
                raise ValueError(f'replicas must be "shard", "copy" or a process group, got {replicas!r}')
            precision = Precision(dtype, rounding)
            self._clock = Clock(as_schedules(decay), start=start, interval=update_interval)
            if live.is_first:
                warn_of_unlikely_decays(self._clock.schedules)
        settings = describe_settings(
            self._clock, precision, replicas=replicas, buffers=buffers, kernel=kernel, store=store, timeout=timeout
        )
        kernel = resolve_kernel(kernel, live, settings)
        make = partial(Tracks, precision=precision, buffers=buffers, kernel=kernel, agree=agree_on, store=store)

        def make_tracks() -> Tracks:
            require_live_weights(model, "ShardedEMA(model)")
            return make(live.layout, [*self._clock.schedules], live.select_parameters())

        tracks = construct_on_all_ranks(live, settings, make_tracks)
        self._updates = Updates(self._clock, live, tracks)
        self._model_with_averages = ModelWithAverages(live, tracks, self._updates, InitialWeights(self._clock, live))

    @property
    def model(self) -> nn.Module:
        """The module given to the constructor."""
        return self._live.layout.model

    @property
    def tracks(self) -> list[str]:
        """The names of the averages; ``["default"]`` for a single one."""
        return [*self._tracks]

    def update(self, *, elapsed: float = 1, found_inf: Tensor | None = None) -> None:
        """Update the averages from the live weights; call it after each optimizer step. Never waits for the device.

        With ``store=Offloaded()``, it waits while the maximum number of updates is pending.

        Args:
            elapsed: the time since the last step, in the unit of the laws and of ``start``: steps, samples or tokens.
                Equal on all ranks.
            found_inf: a gradient scaler's tensor, on its device. If it is nonzero, the step was skipped and is not
                counted.

        Collective: no.
        Memory: none if averages and weights have the same dtype, else a scratch of constant size.
        Raises: RuntimeError inside `swapped` or `serving`, while an optimizer is attached, while a CUDA graph is
            captured, and when an earlier update failed with ``store=Offloaded()`` or was interrupted and cannot be
            finished; TypeError when ``elapsed`` is not a number; ValueError when ``elapsed`` is not positive and
            finite, when the model has changed, or when a law returns a decay outside [0, 1].
        """
        if self._is_attached:
            raise RuntimeError(
                "update() was called while an optimizer is attached, which already updates after each step: the step "
                "would count twice. Remove this call, or call remove() on the handle that attach() returned"
            )
        self._update(found_inf, elapsed=elapsed, overlap=False)

    @in_normal_mode
    def _update(self, found_inf: Tensor | None, *, elapsed: float, overlap: bool) -> None:
        self._model_with_averages.require_inactive("update()")
        self._model_with_averages.prepare_update()
        self._updates.update(found_inf, elapsed=elapsed, overlap=overlap)

    def attach(
        self, optimizer: Optimizer, *, elapsed: Callable[[], float] | None = None, overlap: bool = False
    ) -> OptimizerHook:
        """Update after each real step of ``optimizer``, until ``remove()`` is called on the returned handle.

        Not counted: steps that a gradient scaler skips on the device, and the dummy steps of
        ``torch.distributed.checkpoint``. While attached, `update` raises.

        Args:
            optimizer: a torch optimizer, or one wrapped by accelerate, Lightning or Fabric.
            elapsed: returns the time since the last step, as for `update`; None for one step. It is called at each
                optimizer step, including skipped ones, whose time is not counted.
            overlap: run the update on a side stream of the GPU, concurrent with the next forward and backward pass. The
                next step of any optimizer and every call of this object wait for it; other code must not write to
                parameters before that. No effect on a CPU.

        Collective: no.
        Raises: RuntimeError when an optimizer is attached already; if you have several, attach the one that steps last.
            TypeError when it is not a torch Optimizer, or ``elapsed`` is not a function. ValueError when it steps none
            of the averaged parameters, runs no hooks, or keeps its own average (schedule-free).
        """
        if self._is_attached:
            raise RuntimeError(
                "an optimizer is attached already: call remove() on the handle that attach() returned before attaching "
                "another one. If several optimizers step this model, attach only the one that steps last, or none and "
                "call update() after each step"
            )
        optimizer = unwrap_optimizer(optimizer)
        if elapsed is not None and not callable(elapsed):
            raise TypeError(f"elapsed must be a function that returns the time since the last step, got {elapsed!r}")
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
            lambda found_inf: self._update(found_inf, elapsed=elapsed() if elapsed else 1, overlap=overlap),
            before_steps=self._tracks.streams.join if overlap else None,
        )
        self._model_with_averages.initial_weights.watch(self._optimizer_hook)
        return self._optimizer_hook

    @property
    def _is_attached(self) -> bool:
        return self._optimizer_hook is not None and self._optimizer_hook.is_active

    def swapped(self, track: str | None = None) -> AbstractContextManager[nn.Module]:
        """Inside the ``with`` block the model holds its averages; after it the live weights are back, bit-identical.

        They are put back whether the block returns or raises. Inside, buffers may be written to (``update_bn``), and
        the averages keep the written values. Parameters must not be written to. A graph built before the block cannot
        run backward inside or after it: autograd raises, because its weights were written to.

        Args:
            track: the track to swap in; None for the only one, or the one called ``default``.

        Collective: entering and leaving, if averages are split among replicas (the default under DDP, HSDP, and for
            tensor-parallel parameters placed ``Replicate()``). Never with ``replicas="copy"``, so that one rank may
            evaluate alone under DDP.
        Memory: at most 64 MiB; for averages whose dtype or device differs from the weights', one live shard on the
            device of the average.
        Raises: RuntimeError when the model already holds averages, when ranks do not arrive within ``timeout`` or have
            made different calls, when replicas differ, and on leaving, when parameters were written to or the block of
            another rank raised. ValueError for an unknown track, when the model has changed, or when a parameter
            without an average became trainable.
        Warns: InitialWeightsWarning if more than 10 % of the average is still the initial weights.
        """
        return self._model_with_averages.swapped(self._tracks.resolve(track))

    def serving(self, track: str | None = None) -> AbstractContextManager[nn.Module]:
        """Forward passes in the ``with`` block read the averages, without gradients; the live weights stay in place.

        The block may run between a forward pass and its backward pass, such as for a teacher model, and does not change
        the gradients. Inside, the model's ``state_dict()`` returns the live weights, and buffers are copies: values
        written to them are dropped. For models that cannot be served (FSDP1, CUDA graphs) it warns and uses `swapped`.

        Args:
            track: the track to serve; None for the only one, or the one called ``default``.

        Collective: entering, if averages are split among replicas; leaving, only with `swapped`.
        Memory: a copy of the buffers; if `serving_mode` says "copy", also a copy of this rank's live shards, in full on
            each replica.
        Raises: RuntimeError inside `swapped` or `serving`, when ranks do not arrive within ``timeout``, and on leaving,
            when parameters were written to. ValueError: as `swapped`.
        Warns: InitialWeightsWarning if more than 10 % of the average is still the initial weights.
        """
        return self._model_with_averages.serving(self._tracks.resolve(track))

    @property
    def update_kernel(self) -> str:
        """The names of the kernels that update averages of parameters: the fastest here, unless ``kernel`` was given.

        "foreach" reads the live weights once for each track; the others read them once for all tracks.
        """
        return " and ".join(self._tracks.kernel_names)

    @property
    def serving_mode(self) -> str:
        """What forward passes read inside `serving`; if parameters differ, the costliest of their modes.

        One of "the averages themselves", "a cast copy" (dtypes differ), "a copy on the model's device" (the averages
        are on another one), "a gathered copy" (replicas split the averages), or "swapped(), since" and the reason.
        """
        return self._model_with_averages.get_serving(next(iter(self._tracks.values()))).mode

    def restore(self) -> None:
        """Leave `swapped` early, after an interruption, or after ranks failed to leave it together.

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

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a ShardedEMA cannot be copied or pickled, because it refers to one live model: pickle its "
            "consolidated_state_dict(), or construct another ShardedEMA for another model"
        )

    def __repr__(self) -> str:
        parameters = next(iter(self._tracks.values())).parameters
        numel = sum(average.numel() for average in parameters.values())
        laws = self._clock.schedules
        return (
            f"{type(self).__name__}({len(parameters)} parameters, {numel:,} elements on this rank, "
            f"{laws[DEFAULT_TRACK] if [*laws] == [DEFAULT_TRACK] else laws}, start={self._clock.start}, "
            f"update_interval={self._clock.interval}, update_kernel={self.update_kernel}, "
            f"serving_mode={self.serving_mode}{f', {self._tracks.store}' if self._tracks.store else ''})"
        )

    moves_by: property = _renamed("moves_by", "update_kernel")
    serves_by: property = _renamed("serves_by", "serving_mode")
