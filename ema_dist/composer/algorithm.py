"""Composer's EMA algorithm: averages are updated in training, swapped in for evaluation, and saved in checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from enum import Enum
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger
from torch import Tensor, nn

from ema_dist.averages.full_weights import copy_into
from ema_dist.averages.precision import Compensated, Precision, Stochastic
from ema_dist.averages.step_monitor import StepMonitor
from ema_dist.averages.tracks import BufferPolicy
from ema_dist.composer.checkpoints import CheckpointHandler
from ema_dist.composer.monolithic import transfer_averages
from ema_dist.composer.schedule import DefaultHalfLife, UpdateSchedule
from ema_dist.ema import ShardedEMA
from ema_dist.evaluation.swap import active_swaps
from ema_dist.sharding import Layout, ReplicaPolicy

CHECKPOINT_EVENTS = (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT, Event.ITERATION_CHECKPOINT)


class SwapPhase(Enum):
    """Why the averages are swapped in; the value of a member is the set of events at which they stay swapped in."""

    EVALUATION = frozenset(
        {Event.EVAL_BATCH_START, Event.EVAL_BEFORE_FORWARD, Event.EVAL_AFTER_FORWARD, Event.EVAL_BATCH_END}
    )
    PREDICTION = frozenset(
        {
            *(Event.PREDICT_BATCH_START, Event.PREDICT_BEFORE_FORWARD),
            *(Event.PREDICT_AFTER_FORWARD, Event.PREDICT_BATCH_END),
        }
    )
    CHECKPOINT = frozenset[Event]()


class EMA(Algorithm):
    """A replacement for Composer's EMA algorithm under DDP, FSDP1, FSDP2 and HSDP; only the import changes.

    Evaluation and prediction use the averages; training uses the live weights. A checkpoint that ``CheckpointSaver``
    writes holds the averages as the model's weights; one that ``trainer.save_checkpoint()`` writes holds the live
    weights. Training resumes from either with the live weights and the exact averages.

    Args:
        half_life: the number of batches (``"1000ba"``) or epochs (``"2ep"``) after which half of the old average
            remains; ``"0ba"`` turns averaging off.
        smoothing: instead of a half-life, the factor of the old average at each update, in [0, 1].
        ema_start: when averaging starts: ``"0.1dur"`` (a fraction of the training), ``"100ba"``, ``"1ep"``.
        update_interval: batches or epochs between updates; a half-life accounts for it, a smoothing does not. None:
            each batch, or each epoch if the half-life is in epochs.
        train_with_ema_weights: whether training continues from the averages after each update (experimental).
        dtype: the dtype of the averages; None: float32 for weights narrower than float32, else the weight's own dtype.
        rounding: how bfloat16 averages are rounded: `Stochastic` or `Compensated`.
        replicas: ``"shard"`` shards the averages of replicated weights over the replicas, ``"copy"`` keeps a full
            copy on each. None: ``"copy"`` with sharded checkpoints, for which Composer saves the first replica only;
            else ``"shard"``.
        buffers: ``"average"`` or ``"copy"`` for floating buffers; integer buffers are always copied.
        select: ``(name, parameter) -> bool``; None selects the parameters that require a gradient.
        timeout: seconds that ranks wait for each other before a collective call fails; the default is Composer's.

    Collective: all calls except updates, over all ranks of a `Trainer`. The first update is collective too, because
        it constructs the averages.
    Memory: as for `ShardedEMA`.
    Raises: ValueError for settings that contradict each other or are out of range.
    Source: ``composer.algorithms.EMA`` of Composer 0.32, and ``train_with_ema_weights`` of its first version.
    """

    def __init__(
        self,
        half_life: str | None = DefaultHalfLife("1000ba"),
        smoothing: float | None = None,
        ema_start: str = "0.0dur",
        update_interval: str | None = None,
        train_with_ema_weights: bool = False,  # noqa: FBT001, FBT002  as Composer had it
        *,
        dtype: torch.dtype | None = None,
        rounding: Stochastic | Compensated = Stochastic(),  # noqa: B008 - frozen
        replicas: ReplicaPolicy | None = None,
        buffers: BufferPolicy = "average",
        select: Callable[[str, Tensor], bool] | None = None,
        timeout: float = 300.0,
    ) -> None:
        self._schedule = UpdateSchedule.parse(half_life, smoothing, ema_start, update_interval)
        self.half_life: Time | None = self._schedule.half_life
        self.smoothing: float = self._schedule.smoothing
        self.ema_start: Time = self._schedule.start
        self.update_interval: Time = self._schedule.interval
        self.train_with_ema_weights = train_with_ema_weights
        Precision(dtype, rounding)  # checks the settings now, not only when the averages begin
        self._settings: dict[str, Any] = {
            "dtype": dtype,
            "rounding": rounding,
            "buffers": buffers,
            "select": select,
            "timeout": timeout,
        }
        self._replicas = replicas
        self._ema: ShardedEMA | None = None
        self._phase: SwapPhase | None = None
        self._interrupted_phase: SwapPhase | None = None
        self._swap_stack = ExitStack()
        self._step_monitor: StepMonitor | None = None
        self._checkpoints: CheckpointHandler | None = None

    @property
    def ema(self) -> ShardedEMA | None:
        """The averages; None until averaging starts."""
        return self._ema

    @property
    def ema_started(self) -> bool:
        """Whether averaging has started."""
        return self._ema is not None

    @property
    def ema_weights_active(self) -> bool:
        """Whether the averages are swapped into the model."""
        return self._phase is not None

    def __repr__(self) -> str:
        return (
            f"EMA(half_life={_time_string(self.half_life)}, smoothing={None if self.half_life else self.smoothing}, "
            f"ema_start={_time_string(self.ema_start)}, update_interval={_time_string(self.update_interval)}, "
            f"train_with_ema_weights={self.train_with_ema_weights})"
        )

    def match(self, event: Event, state: State) -> bool:
        """Whether `apply` has something to do at this event."""
        if self._interrupted_phase is not None or (self._phase is not None and event not in self._phase.value):
            return True
        if event in CHECKPOINT_EVENTS:
            return self._ema is not None and _is_checkpoint_due(event, state)
        return event in (
            *(Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.FIT_START),
            *(Event.EVAL_START, Event.PREDICT_START, self._schedule.update_event),
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:  # noqa: ARG002  Composer's signature
        """Update the averages, or swap them in or out, depending on the event."""
        self._resume_phase(event)
        if self._phase is not None and event not in self._phase.value:
            self._swap_out()
        if event == Event.INIT:
            self._initialize(state)
        elif event == Event.BEFORE_LOAD:
            self._require_copy_replicas()
            self._require_checkpoints().before_load()
        elif event == Event.AFTER_LOAD:
            self._ema = self._require_checkpoints().after_load(self._make_averages)
        elif event == Event.FIT_START:
            self._follow_rewrapping(state)
            self._monitor_steps(state)
            self._start_after_load(state)
        elif event == Event.EVAL_START:
            self._follow_rewrapping(state)
            self._swap_in(SwapPhase.EVALUATION)
        elif event == Event.PREDICT_START:
            self._follow_rewrapping(state)
            self._swap_in(SwapPhase.PREDICTION)
        elif event in CHECKPOINT_EVENTS and _is_checkpoint_due(event, state):
            self._swap_in(SwapPhase.CHECKPOINT)
        elif event == self._schedule.update_event:
            self._update(state)

    def state_dict(self) -> dict[str, Any]:
        """The algorithm's part of a checkpoint; in sharded checkpoints the tensors are in Composer's State instead.

        Collective: over all ranks, when several hold parts of the averages.
        """
        algorithm_state = super().state_dict()
        if self._checkpoints is None:  # not in a Trainer yet
            return algorithm_state
        algorithm_state |= {"ema_weights_active": self.ema_weights_active, "ema_started": self.ema_started}
        if self._checkpoints.is_loading:
            self._checkpoints.allocate_targets(self._make_averages)
            return algorithm_state
        if self._ema is None:
            self._checkpoints.release()
            return algorithm_state
        live = self._copy_live_weights() if self._phase is not None else None
        return algorithm_state | self._checkpoints.make_state(self._ema, live)

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:  # noqa: FBT001, FBT002, ARG002
        """Keep the algorithm's part of a checkpoint until `AFTER_LOAD`.

        The checkpoint may come from this EMA or from any version of Composer's.

        Raises: ValueError at `AFTER_LOAD`, if the checkpoint was saved from a different model.
        """
        self._require_checkpoints().keep_state(state)

    def get_ema_model(self, model: nn.Module) -> nn.Module:
        """Overwrite the parameters and buffers of a model with the averages, and return the model.

        Args:
            model: the trainer's model, a model wrapped the same way, or an unwrapped model on every rank.

        Collective: over all ranks that hold the averages.
        Raises: ValueError while the averages are swapped into the trainer's model, and before averaging starts.
        """
        if self.ema_weights_active:
            raise ValueError("The ema weight are currently contained in the composer model.")
        self._require_checkpoints()
        if self._ema is None:
            raise ValueError(
                f"there are no averages yet: averaging starts at ema_start, {_time_string(self.ema_start)}"
            )
        self._ema.copy_to(model)
        return model

    def get_training_model(self, model: nn.Module) -> nn.Module:
        """Overwrite the parameters and buffers of a model with the live weights, and return the model.

        Args:
            model: as for `get_ema_model`; in the trainer's own model, the averages are swapped out.

        Collective: over all ranks that hold the model.
        Memory: one full tensor on each rank, if ``model`` is sharded differently from the trainer's model.
        Raises: ValueError unless the averages are swapped into the trainer's model.
        """
        if not self.ema_weights_active:
            raise ValueError("The training weights are currently contained in the composer model.")
        assert self._ema is not None
        phase = self._phase
        self._swap_out()
        if {*map(id, model.parameters())} != {*map(id, self._ema.model.parameters())}:
            try:
                copy_into(Layout(model, "copy"), Layout(self._ema.model, "copy"), {})
            finally:
                self._swap_in(phase)
        return model

    def _initialize(self, state: State) -> None:
        # By name, so that Composer's own EMA counts too.
        emas = [algorithm for algorithm in state.algorithms if type(algorithm).__qualname__ == "EMA"]
        if len(emas) > 1:
            raise ValueError(
                f"expected one EMA among the algorithms, found {len(emas)}: {emas}; at an evaluation each would swap "
                "the averages of the other, and in checkpoints one would overwrite the other. Remove all but one"
            )
        if self._step_monitor is not None:  # it belongs to an earlier Trainer
            self._step_monitor.remove()
        self._step_monitor = None
        self._ema = None
        self._phase = None
        self._interrupted_phase = None
        self._swap_stack = ExitStack()
        self._checkpoints = CheckpointHandler(state, self._pause_for_save)

    def _require_checkpoints(self) -> CheckpointHandler:
        if self._checkpoints is None:
            raise RuntimeError("EMA is not in a Trainer: pass it as Trainer(algorithms=[EMA(...)])")
        return self._checkpoints

    def _require_copy_replicas(self) -> None:
        if self._require_checkpoints().is_sharded and self._replicas not in (None, "copy"):
            raise ValueError(
                f"replicas={self._replicas!r} cannot be used with sharded checkpoints: Composer saves the first "
                'replica alone, which would hold a part of the averages. Leave it out, or pass replicas="copy"'
            )

    def _make_averages(self, model: nn.Module) -> ShardedEMA:
        """Construct averages, which start as copies of the model's weights."""
        replicas = self._replicas or ("copy" if self._require_checkpoints().is_sharded else "shard")
        return ShardedEMA(model, decay=self.smoothing, replicas=replicas, **self._settings)

    def _follow_rewrapping(self, state: State) -> None:
        """Reshard the averages if the model has been wrapped: Composer wraps it in DDP after loading a checkpoint."""
        if self._ema is not None and self._ema.model is not state.model:
            self._ema = transfer_averages(self._ema, self._make_averages(state.model))

    def _monitor_steps(self, state: State) -> None:
        if self._step_monitor is None or self._step_monitor.optimizers != [*state.optimizers]:
            if self._step_monitor is not None:
                self._step_monitor.remove()
            self._step_monitor = StepMonitor(state.optimizers, has_stepped=self._schedule.is_mid_interval(state))

    def _start_after_load(self, state: State) -> None:
        """Start the averages now, if the checkpoint has none and ``ema_start`` has passed."""
        if self._ema is None and self._require_checkpoints().lacks_averages and self._schedule.has_started(state):
            warnings.warn(
                f"the checkpoint has no averages, although averaging starts at {_time_string(self.ema_start)} and "
                f"training goes on at {_time_string(state.timestamp.batch)}. The averages start from the current "
                "weights",
                stacklevel=2,
            )
            self._ema = self._make_averages(state.model)

    def _update(self, state: State) -> None:
        assert self._step_monitor is not None, "training starts with FIT_START"
        if self._ema is None:
            if not self._schedule.has_started(state):
                self._step_monitor.consume()  # steps before the start do not count
                return
            self._ema = self._make_averages(state.model)
        if not self._schedule.is_due(state):
            return
        stepped, found_inf = self._step_monitor.consume()
        if not stepped:
            return
        self._ema.update(found_inf=found_inf)
        if self.train_with_ema_weights:
            self._ema.copy_to(state.model)

    def _swap_in(self, phase: SwapPhase | None) -> None:
        if self._ema is not None:
            self._swap_stack.enter_context(self._ema.swapped())
            self._phase = phase

    def _pause_for_save(self) -> None:
        """Swap the averages out for an explicit save, during an evaluation or after an exception in one."""
        if self._phase in (SwapPhase.EVALUATION, SwapPhase.PREDICTION):
            self._interrupted_phase = self._phase
            self._swap_out()

    def _resume_phase(self, event: Event) -> None:
        """Swap the averages back in after a save, if the evaluation continues."""
        interrupted_phase, self._interrupted_phase = self._interrupted_phase, None
        if interrupted_phase is not None and event in interrupted_phase.value:
            self._swap_in(interrupted_phase)

    def _swap_out(self) -> None:
        assert self._ema is not None
        try:
            self._ema.restore()
        finally:
            if not active_swaps(self._ema.model):  # else the ranks did not leave together; the next event tries again
                self._phase = None
                self._swap_stack.close()
                self._require_checkpoints().release()

    def _copy_live_weights(self) -> Mapping[str, Tensor]:
        """Copy the model's state with the live weights, while the averages are swapped in."""
        phase = self._phase
        self._swap_out()
        try:
            return self._require_checkpoints().copy_model_state()
        finally:
            self._swap_in(phase)


def _is_checkpoint_due(event: Event, state: State) -> bool:
    """Whether a `CheckpointSaver` will save at this event."""
    savers = [saver for saver in state.callbacks if isinstance(saver, CheckpointSaver)]
    return any(
        saver.save_interval(state, event) and saver.last_checkpoint_batch != state.timestamp.batch for saver in savers
    )


def _time_string(time: Time | None) -> str | None:
    return None if time is None else time.to_timestring()
