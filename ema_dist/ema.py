"""The exponential moving average of a model's weights, sharded as the model is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ema_dist.averages.full_weights import collect, copy_into, full_shapes, gather_pipeline, scatter
from ema_dist.averages.live_model import LiveModel
from ema_dist.averages.offload import Offloaded
from ema_dist.averages.optimizer_hook import OptimizerHook
from ema_dist.averages.precision import Compensated, Precision, Stochastic
from ema_dist.averages.state import load_state, make_state
from ema_dist.averages.tracks import BufferPolicy, Tracks
from ema_dist.communication.rendezvous import agree_on
from ema_dist.evaluation.tracked_model import TrackedModel
from ema_dist.schedules.clock import Clock
from ema_dist.schedules.decay import DEFAULT_TRACK, HalfLife, as_decays
from ema_dist.sharding import Layout, ReplicaPolicy


class ShardedEMA:
    """The exponential moving average (EMA) of a model's weights, kept as shards beside the live ones on every rank.

    How the model is wrapped is found out from the model: plain, DDP, FSDP1, FSDP2 (``fully_shard``), HSDP, tensor
    parallel, any of these compiled or with activation checkpointing. Wrap it and move it to its device first.

    Args:
        model: whose weights are averaged.
        decay: `HalfLife` in optimizer steps, or the factor of the old average at each update, in [0, 1]; or several of
            them by name: then the model has several averages, called tracks.
        start: until this optimizer step the average simply follows the live weights.
        update_interval: average every k-th optimizer step; a `HalfLife` accounts for it, a factor does not.
        dtype: of the averages. None: float32 for weights narrower than float32, else the weight's own.
        rounding: of bfloat16 averages, ``dtype=torch.bfloat16``: `Stochastic`, or `Compensated`.
        replicas: ``"shard"`` splits averages of weights that replicas hold alike (DDP, HSDP) among the replicas,
            ``"copy"`` keeps them whole on each. A process group says over which ranks an unwrapped model is replicated.
        buffers: ``"average"`` or ``"copy"`` for floating buffers; integer buffers are always copied. Non-persistent
            buffers are left alone.
        select: ``(name, parameter) -> bool``; None selects the parameters that require a gradient.
        kernel: what moves the averages: ``"foreach"``, ``"scratch"``, ``"compiled"`` (by this machine's C compiler) or
            ``"triton"``; None for the fastest one that compiles nothing on a CPU, and may be Triton's on a GPU.
        store: where the averages are kept: None for beside the live weights, or `Offloaded`.
        timeout: seconds that ranks wait for each other before a collective call fails, and on leaving `swapped`.

    Collective: construction compares the replicas once when averages are split among them; otherwise not.
    Memory: for each track one average per selected parameter's shard: 1/R of it where R replicas share it; and what
        ``store`` takes. While kernels are measured, at most 64 MiB for each track and as many for the live weights.
    Raises: ValueError for a setting out of range, a model on the meta device, or when nothing is selected;
        RuntimeError when replicas differ.
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
        if store is not None and not isinstance(store, Offloaded):
            raise ValueError(f"store is Offloaded(...) or None, got {store!r}")
        if not isinstance(replicas, ProcessGroup) and replicas not in ("shard", "copy"):
            raise ValueError(f'replicas is "shard", "copy" or a process group, got {replicas!r}')
        if buffers not in ("average", "copy"):
            raise ValueError(f'buffers is "average" or "copy", got {buffers!r}')
        self._clock = Clock(as_decays(decay), start=start, interval=update_interval)
        self._optimizer_hook: OptimizerHook | None = None
        live = LiveModel(model, replicas=replicas, select=select, timeout=timeout)
        if live.is_split:
            live.rendezvous("ShardedEMA(model)")
            live.check_replicas("ShardedEMA(model)")
        tracks = Tracks(
            live.layout,
            self._clock.decays.keys(),
            live.selected,
            precision=precision,
            buffers=buffers,
            kernel=kernel,
            agree=agree_on if live.has_replicated_averages else None,
            store=store,
        )
        self._tracked_model = TrackedModel(live, tracks)

    @property
    def model(self) -> nn.Module:
        """The module that was given to the constructor."""
        return self._live.layout.model

    @property
    def tracks(self) -> list[str]:
        """The names of the averages; ``["default"]`` for a single one."""
        return [*self._tracks]

    @property
    def steps(self) -> int:
        """Optimizer steps seen, without those that a gradient scaler skipped; asks the device if it counted them."""
        return self._clock.steps

    @property
    def updates(self) -> int:
        """Averages taken; following the live weights until ``start`` does not count."""
        return self._clock.updates

    def update(self, *, found_inf: Tensor | None = None) -> None:
        """Average the live weights as they are now: call it once after each optimizer step. Never waits for the device.

        With ``store=Offloaded()`` it waits for earlier updates when too many are under way.

        Args:
            found_inf: of a gradient scaler, on its device: not zero where the optimizer left the step out, to skip it.

        Collective: no.
        Memory: nothing where dtypes are equal, else a constant scratch.
        Raises: RuntimeError inside `swapped`, or when an earlier update failed with ``store=Offloaded()``; ValueError
            when the model has changed.
        """
        self._update(found_inf, overlap=False)

    def _update(self, found_inf: Tensor | None, *, overlap: bool) -> None:
        self._tracked_model.require_inactive("update()")
        self._tracked_model.prepare_update()
        weights = self._clock.tick(found_inf)
        self._tracks.update_averages(weights, self._clock.update_number, overlap=overlap)

    def attach(self, optimizer: Optimizer, *, overlap: bool = False) -> OptimizerHook:
        """Update after each real step of ``optimizer`` from now on, until ``remove()`` of the returned handle.

        Steps that a gradient scaler lets a fused optimizer skip are left out on the device, and so are the dummy
        steps by which ``torch.distributed.checkpoint`` fills a fresh optimizer's state.

        Args:
            overlap: let a GPU update behind the next forward and backward pass, on a side stream. The next step of any
                optimizer, and every call of this object, comes after it; whatever else writes to parameters must not
                do so in between. On a CPU nothing changes.

        Collective: no.
        Raises: RuntimeError when an optimizer is attached already: with several, attach the one that steps last.
            ValueError when this one steps none of the averaged parameters.
        """
        if self._optimizer_hook is not None and self._optimizer_hook.is_active:
            raise RuntimeError("an optimizer is attached already; remove() its handle first, or call update() yourself")
        self._tracked_model.prepare("attach()", collective=False)
        stepped_ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(self._live.layout.parameters[name].owner) in stepped_ids for name in self._live.selected):
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
        """The model holds its averages inside the ``with`` block, and its live weights again after it, to the bit.

        They come back when the block returns and when it raises. Inside, buffers may be written (``update_bn``): what
        is written stays in the averages. Parameters may not. A graph that was built before cannot run backward inside
        or after: autograd notices that its weights were written to, and raises.

        Args:
            track: whose averages; None for the only one, or the one called ``default``.

        Collective: where averages are split among replicas (the default under DDP, HSDP, and for tensor-parallel
            parameters placed ``Replicate()``), entering and leaving. With ``replicas="copy"`` never, so that one rank
            may evaluate alone under DDP.
        Memory: at most 64 MiB; where averages have another dtype than the live weights, one live shard on top; where
            they are on another device, that on the averages' device.
        Raises: RuntimeError when swapped already, when ranks do not come within ``timeout``, when replicas differ, and
            on leaving, when parameters were written to. ValueError for an unknown track, when the model has changed, or
            when a parameter became trainable that has no average.
        """
        return self._tracked_model.swapped(self._tracks.resolve(track))

    def serving(self, track: str | None = None) -> AbstractContextManager[nn.Module]:
        """Forward passes in the ``with`` block read the averages, without gradients; the live weights stay in place.

        It may stand between a forward pass and its backward, for a teacher: the gradients are the same, to the bit.
        ``state_dict()`` of the model holds the live weights inside. Buffers are copies: what is written to them is
        dropped. Where the model does not allow it (FSDP1, CUDA graphs), `swapped` does instead, with a warning.

        Args:
            track: whose averages; None for the only one, or the one called ``default``.

        Collective: entering, where averages are split among replicas; leaving, only with `swapped`.
        Memory: the buffers. Where `serving_mode` says so a copy of this rank's live shards, whole on each replica.
        Raises: RuntimeError inside `swapped` or `serving`, when ranks do not come within ``timeout``, and on leaving,
            when parameters were written to. ValueError as `swapped`.
        """
        return self._tracked_model.serving(self._tracks.resolve(track))

    @property
    def update_kernel(self) -> str:
        """The kernels that move the averages of parameters, by name: the fastest here, unless ``kernel`` was given.

        "foreach" reads the live weights for each track, the others once for all.
        """
        return " and ".join(self._tracks.kernel_names)

    @property
    def serving_mode(self) -> str:
        """What forward passes read inside `serving`, at the costliest.

        Either "the averages themselves", "a cast copy" where dtypes differ, "a copy on the model's device" where the
        averages are kept elsewhere, "a gathered copy" where replicas share them, or "swapped(), since" there is no
        other way.
        """
        return self._tracked_model.get_serving(next(iter(self._tracks.values()))).mode

    def restore(self) -> None:
        """Leave `swapped`: for ranks that could not leave it together, or to end it early; else nothing happens.

        Collective: as `swapped`. Memory: as `swapped`. Raises: as `swapped` on leaving.
        """
        self._tracked_model.restore()

    def check_replicas(self) -> None:
        """Compare the live weights of ranks that should hold the same ones (DDP, HSDP), by checksums of their bits.

        Collective: over all ranks that hold the model. Memory: 8 bytes per tensor and replica.
        Raises: RuntimeError naming the tensors that differ and the ranks on which they do.
        """
        self._tracked_model.prepare("check_replicas()", collective=True)
        self._live.check_replicas("check_replicas()")

    def state_dict(self) -> dict[str, Any]:
        """The averages and counts as `torch.distributed.checkpoint` (DCP) saves and reshards them.

        The tensors share storage with the averages, so that DCP loads into them; names are all it compares before that.
        Inside `swapped`, and of `Compensated` averages, they are copies, which `load_state_dict` takes over.

        Collective: over all ranks that hold the model, when several hold parts of its averages: they meet, and send
            nothing.
        Shape: ``{"format": 1, "steps": int, "updates": int, "tracks": {track: {"decay": {...}, "averages": {name:
            tensor}, "buffers": {name: tensor}}}}``, under first canonical names.
        """
        self._tracked_model.prepare("state_dict()", collective=self._live.has_sharded_averages)
        current: Mapping[str, Mapping[str, Tensor]] = {
            track: self._tracked_model.current(averages) for track, averages in self._tracks.items()
        }
        if self._tracked_model.swap is not None:  # they lie in the model: nothing must be loaded into them there
            current = {track: self._tracks[track].clone_shared(averages) for track, averages in current.items()}
        return make_state(self._clock, self._live.layout, self._tracks, current)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned: on this layout, resharded by DCP, or with full tensors.

        The decay given to the constructor stays; a different one in ``state_dict`` is a warning.

        Collective: no.
        Raises: RuntimeError inside `swapped`; ValueError when format, tracks, names or shapes differ, before anything
            changes.
        """
        self._tracked_model.require_inactive("load_state_dict()")
        self._tracked_model.prepare("load_state_dict()", collective=False)
        load_state(state_dict, self._clock, self._live.layout, self._tracks)

    def gather(self, *, dtype: torch.dtype | None = None, track: str | None = None) -> Iterator[tuple[str, Any]]:
        """The entries of `full_state_dict` one by one: (name, CPU tensor) on the first rank, (name, None) elsewhere.

        Collective: over all ranks that hold the model, when several hold parts of its averages; each must exhaust the
            iterator.
        Memory: one full tensor beyond those handed out on the first rank, one elsewhere.
        """
        return self._tracked_model.gather("gather()", self._tracks.resolve(track), dtype=dtype)

    def full_state_dict(
        self, *, dtype: torch.dtype | None = None, track: str | None = None, pipeline: ProcessGroup | None = None
    ) -> dict[str, Any]:
        """The averaged model on the first rank (rank 0), ``{}`` elsewhere: loads strictly into the unwrapped model.

        Frozen parameters, tied names, buffers and extra states are in it, so that nothing is missing. A model that
        each rank holds alone, wrapped in nothing, is each rank's own, and each gets its own dictionary. So does the
        first rank of each pipeline stage: without ``pipeline`` it holds the modules of that stage only.

        Args:
            dtype: of floating tensors; None for the dtype of each live one.
            track: whose averages; None for the only one, or the one called ``default``.
            pipeline: the group of pipeline stages to unite: its first rank gets the entries of all of them.

        Collective: over all ranks that hold the model, when several hold parts of its averages; over ``pipeline``.
        Memory: the result and one more full tensor on the first rank, one full tensor elsewhere.
        Shape: full tensors, contiguous, on the CPU; tied names share one.
        Raises: RuntimeError when ranks do not come within ``timeout``; ValueError when the model has changed, or when
            stages hold different tensors under one name.
        """
        entries = self._tracked_model.gather("full_state_dict()", self._tracks.resolve(track), dtype=dtype)
        if pipeline is not None:
            entries = gather_pipeline(entries, self._live.layout, pipeline, timeout=self._live.timeout)
        return collect(entries, is_destination=self._live.is_first)

    def full_shapes(self, *, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        """The entries of `full_state_dict` as tensors on the meta device; None for extra states that are not tensors.

        Collective: no.
        """
        return full_shapes(self._live.layout, dtype=dtype)

    def load_full_state_dict(self, full: Mapping[str, Any], *, track: str | None = None) -> None:
        """The reverse of `full_state_dict`: the first rank's full tensors become everyone's averages.

        Live weights, frozen parameters and counts stay as they are. Other ranks' ``full`` is not looked at. Each value
        is asked for twice, and only one at a time is held, so that a mapping may read them from files.

        Collective: over all ranks that hold the model. Memory: one full tensor on each rank.
        Raises: RuntimeError inside `swapped`, and on every rank when a value cannot be read; ValueError on every rank
            when names, shapes or kinds of dtype differ, before anything changes.
        """
        averages = self._tracks.resolve(track)
        self._tracked_model.require_inactive("load_full_state_dict()")
        self._tracked_model.prepare("load_full_state_dict()", collective=True)
        scatter(self._live.layout, averages, full)
        averages.find_infinities()
        self._tracks.bind_layout(self._live.layout)

    def copy_to(self, model: nn.Module, *, track: str | None = None) -> None:
        """Overwrite the live weights of ``model`` with the averages, and all else in its state with this model's.

        Args:
            model: the one given at construction, one wrapped the same way, or an unwrapped one on every rank.
            track: whose averages; None for the only one, or the one called ``default``.

        Collective: over all ranks that hold the model, when several hold parts of its averages.
        Memory: one full tensor on each rank.
        Raises: RuntimeError inside `swapped`; ValueError when names or shapes differ, before anything changes.
        """
        averages = self._tracks.resolve(track)
        self._tracked_model.require_inactive("copy_to()")
        self._tracked_model.prepare("copy_to()", collective=self._live.has_sharded_averages)
        copy_into(Layout(model, "copy"), self._live.layout, averages.recombined())

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
        warnings.warn(f"ShardedEMA.{old} was renamed: use ShardedEMA.{new}", DeprecationWarning, stacklevel=3)
        return getattr(self, new)

    @property
    def _live(self) -> LiveModel:
        return self._tracked_model.live

    @property
    def _tracks(self) -> Tracks:
        return self._tracked_model.tracks
