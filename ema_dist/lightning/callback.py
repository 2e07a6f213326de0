"""Lightning's EMA callback: averages are updated in training, swapped in for validation, and saved in checkpoints."""

# ruff: noqa: ARG002  the signatures of hooks are Lightning's

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from ema_dist.averages.offload import Offloaded
from ema_dist.averages.precision import Compensated, Precision, Stochastic
from ema_dist.averages.step_monitor import StepMonitor
from ema_dist.ema import ShardedEMA
from ema_dist.evaluation.block import EvaluationBlock
from ema_dist.lightning.arguments import checked_count, checked_device, is_averaged_by_default, make_store
from ema_dist.lightning.checkpoints import WEIGHTS, add_averages, copy_weights, load_averages
from ema_dist.lightning.failures import report_failure, wait_for_failure_of_all_ranks
from ema_dist.lightning.progress import Progress
from ema_dist.lightning.trainer_checks import optimizers_of_averaged_parameters, require_supported
from ema_dist.lightning.weights_only_hook import unwrap_save_hook, wrap_save_hook
from ema_dist.messages import add_note
from ema_dist.schedules.clock import Clock
from ema_dist.schedules.decay import as_schedules, require_default_track
from ema_dist.schedules.schedule import Schedule
from ema_dist.sharding import ReplicaPolicy


class EMAWeightAveraging(Callback):
    """Lightning's ``EMAWeightAveraging`` on every layout: plain, DDP, FSDP1, FSDP2. Change one import.

    Validation in a fit sees the averages, training the live weights; after the fit, the model holds the averages.
    Checkpoints hold the averages as the model's weights, and the live weights in an entry of their own.

    Args:
        device: where the averages are stored; None for the model's device. ``"cpu"`` keeps the averages of a model on a
            GPU in CPU memory, as ``store=Offloaded()`` does.
        use_buffers: True averages floating buffers, False copies them at each update. Integer ones are always copied.
        decay: the factor of the old average at each update, an averaging law, or several by name; as for `ShardedEMA`.
            Laws count time in optimizer steps since the first update.
        update_every_n_steps: update after the optimizer steps 1, 1 + n, 1 + 2n, ...; 0 turns updates after steps off.
        update_starting_at_step: do not update after the first n optimizer steps; until then the averages stay at the
            initial weights.
        update_starting_at_epoch: also update at the end of each epoch from this one on, counted from 0. The update
            follows the saving of the epoch's checkpoints.
        start: updates up to this time copy the live weights; 1 makes only the first update a copy.
        dtype: as for `ShardedEMA`.
        rounding: as for `ShardedEMA`.
        replicas: as for `ShardedEMA`: ``"shard"`` splits the averages among the ranks of DDP.
        select: as for `ShardedEMA`; None also selects frozen parameters, unless they are quantized.
        kernel: as for `ShardedEMA`.
        store: as for `ShardedEMA`.
        timeout: as for `ShardedEMA`.

    Collective: all ranks of a Trainer call the hooks together; updates do not communicate.
    Memory: as `ShardedEMA`. While a checkpoint is saved, CPU memory holds a copy of the weights: of this rank's shards
        if the checkpoint is sharded; else of the full weights, on the first rank, which also holds the full averages.
    Raises: MisconfigurationException for settings that are out of range or contradict each other, and when the
        Trainer has another averaging callback or an unsupported strategy.
    Source: ``lightning.pytorch.callbacks.EMAWeightAveraging`` of Lightning 2.6.
    """

    def __init__(  # noqa: PLR0913  Lightning's arguments and those of ShardedEMA
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,  # noqa: FBT001, FBT002  as in Lightning
        decay: Schedule | float | Mapping[str, Schedule | float] = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        *,
        start: float = 1,
        dtype: torch.dtype | None = None,
        rounding: Stochastic | Compensated = Stochastic(),  # noqa: B008 - frozen
        replicas: ReplicaPolicy = "shard",
        select: Callable[[str, Tensor], bool] | None = None,
        kernel: str | None = None,
        store: Offloaded | None = None,
        timeout: float = 300.0,
    ) -> None:
        self.update_every_n_steps: int = checked_count("update_every_n_steps", update_every_n_steps) or 0
        self.update_starting_at_step: int | None = checked_count("update_starting_at_step", update_starting_at_step)
        self.update_starting_at_epoch: int | None = checked_count("update_starting_at_epoch", update_starting_at_epoch)
        self._device = checked_device(device, store)
        self._store = store
        try:  # now, not only when a fit begins
            Precision(dtype, rounding)
            Clock(as_schedules(decay), start=start, interval=1)
            require_default_track(decay)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"EMAWeightAveraging: {error}") from error
        self._select = select or is_averaged_by_default
        self._settings: dict[str, Any] = {
            "decay": decay,
            "start": start,
            "dtype": dtype,
            "rounding": rounding,
            "replicas": replicas,
            "buffers": "average" if use_buffers else "copy",
            "select": self._select,
            "kernel": kernel,
            "timeout": timeout,
        }
        self.ema: ShardedEMA | None = None
        """The averages of the current or last fit; None before the first ``on_fit_start``."""
        self._is_fitting = False
        self._progress = Progress()
        self._checkpoint: Mapping[str, Any] | None = None
        """A checkpoint that Lightning loaded before it wrapped the model; `on_fit_start` takes the averages from it."""
        self._swap: EvaluationBlock[Any] | None = None
        self._step_monitor: StepMonitor | None = None

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether to update the averages now, after a step or an epoch. Override it to choose other times.

        Args:
            step_idx: the number of optimizer steps before this one; None at the end of an epoch.
            epoch_idx: the number of epochs before this one; None after a step.
        """
        if step_idx is not None:
            first, interval = self.update_starting_at_step or 0, self.update_every_n_steps
            return step_idx >= first and interval > 0 and step_idx % interval == 0
        first_epoch = self.update_starting_at_epoch
        return epoch_idx is not None and first_epoch is not None and epoch_idx >= first_epoch

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the Trainer, and forget an earlier fit."""
        require_supported(trainer, self)
        if stage == TrainerFn.FITTING:
            self._is_fitting = False  # also after a fit that an exception ended
            self._progress = Progress()
            self._checkpoint = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Construct the averages: this is the first hook that sees the wrapped model. FSDP loads checkpoints later."""
        wrap_save_hook(pl_module, trainer, self)  # not in setup(), which a callback added after it does not get
        self._is_fitting = True
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            self.ema = self._make_averages(trainer)
        else:
            self.ema = load_averages(checkpoint, trainer, lambda: self._make_averages(trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting optimizer steps; make the epoch's update that a loaded checkpoint lacks."""
        self._progress.fill(trainer)
        optimizers = optimizers_of_averaged_parameters(trainer.optimizers, self._model(trainer), self._select)
        self._step_monitor = StepMonitor(optimizers, has_stepped=False)
        self._update_after_epoch(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the update that was due at the end of the previous epoch."""
        self._update_after_epoch(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Update the averages once, however many optimizers stepped in this batch."""
        monitor = self._require_fit_begun(self._step_monitor)
        has_stepped, found_inf = monitor.consume()
        if not has_stepped:
            return
        if found_inf is not None and not self._updates_after_every_step:
            # Whether an update is due depends on how many steps were not skipped, so wait for the device to say.
            if found_inf.item():
                return
            found_inf = None
        self._progress.steps += 1
        if self.should_update(step_idx=self._progress.steps - 1):
            self._update(trainer, found_inf)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the averages in, before the hooks of the LightningModule."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_in()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the live weights in, before ModelCheckpoint saves."""
        self._swap_out()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Swap the live weights in, before ModelCheckpoint saves with ``save_on_exception``.

        If the fit has not failed on all ranks, raise the exception at once: a save would wait for the other ranks.
        """
        self._stop_counting()
        absence = wait_for_failure_of_all_ranks(self._settings["timeout"]) if self._is_fitting else None
        if absence is None:
            self._swap_out(exception)
            return
        report_failure(exception)
        add_note(exception, f"The live weights may not be back, and no checkpoint is saved: {absence}")
        if isinstance(exception, Exception):  # Lightning ends its processes after a KeyboardInterrupt
            raise exception

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the averages into the model, where they remain after the fit."""
        ema = self._require_fit_begun(self.ema)
        self._update_after_epoch(trainer)
        self._stop_counting()
        ema.copy_to(self._model(trainer))
        self._is_fitting = False  # checkpoints after this have no live weights

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module's own hook."""
        if stage == TrainerFn.FITTING:
            unwrap_save_hook(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the progress, in a form that Lightning's own callback can load."""
        return self._progress.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load progress saved by this callback or by Lightning's own."""
        self._progress = Progress.load(state_dict)

    def on_save_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Save the averages as the weights of the checkpoint, and add the live weights."""
        if not self._is_fitting:
            return
        ema = self._require_fit_begun(self.ema)
        live, averages = self._both_weights(trainer, checkpoint[WEIGHTS])
        add_averages(checkpoint, ema, live=live, averages=averages)

    def save_weights(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Save the averages as the weights of a checkpoint with ``save_weights_only=True``, without live weights."""
        if self._is_fitting:
            _, checkpoint[WEIGHTS] = self._both_weights(trainer, checkpoint[WEIGHTS])

    def on_load_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """In a fit, load the live weights and the averages; else keep the averages, which Lightning has loaded."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if not self._is_fitting:
            self._checkpoint = checkpoint
        else:
            self.ema = None  # frees the averages of the initial weights
            self.ema = load_averages(checkpoint, trainer, lambda: self._make_averages(trainer))

    @property
    def _updates_after_every_step(self) -> bool:
        return type(self).should_update is EMAWeightAveraging.should_update and (
            (self.update_every_n_steps, self.update_starting_at_step or 0, self.update_starting_at_epoch)
            == (1, 0, None)
        )

    def _make_averages(self, trainer: pl.Trainer) -> ShardedEMA:
        store = make_store(self._device, self._store, trainer.strategy.root_device)
        return ShardedEMA(self._model(trainer), store=store, **self._settings)

    @staticmethod
    def _model(trainer: pl.Trainer) -> nn.Module:
        model = trainer.strategy.model
        assert model is not None
        return model

    def _require_fit_begun(self, value: Any) -> Any:  # noqa: ANN401
        if value is None or not self._is_fitting:
            raise MisconfigurationException(
                "EMAWeightAveraging was added after the fit had begun, so it has no averages: pass it in "
                "Trainer(callbacks=[...]), or return it from configure_callbacks()"
            )
        return value

    def _update_after_epoch(self, trainer: pl.Trainer) -> None:
        """Make the update at the end of the last epoch, if it is due and was not made.

        It is not made in on_train_epoch_end, because ModelCheckpoint saves there and must save what the validation
        measured. A checkpoint saved there lacks this update; when a run resumes, `on_train_start` makes it.
        """
        self._require_fit_begun(self.ema)
        epoch = trainer.current_epoch - 1
        if epoch > self._progress.latest_epoch:
            if self.should_update(epoch_idx=epoch):
                self._update(trainer, None)
            self._progress.latest_epoch = epoch

    def _update(self, trainer: pl.Trainer, found_inf: Tensor | None) -> None:
        assert self.ema is not None
        self.ema.update(elapsed=self._progress.elapsed(), found_inf=found_inf)
        self._progress.note_update(trainer)

    def _swap_in(self) -> None:
        swap = self._require_fit_begun(self.ema).swapped()
        swap.__enter__()
        self._swap = swap

    def _swap_out(self, error: BaseException | None = None) -> None:
        swap, self._swap = self._swap, None
        if swap is not None:
            swap.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def _stop_counting(self) -> None:
        if self._step_monitor is not None:
            self._step_monitor.remove()
        self._step_monitor = None

    def _both_weights(self, trainer: pl.Trainer, current: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the model's state with the live weights, and with the averages; ``current`` is its state now."""
        holds_averages = self._swap is not None
        with self._other_weights_in_model():
            other = copy_weights(trainer)
        return (other, current) if holds_averages else (current, other)

    @contextmanager
    def _other_weights_in_model(self) -> Iterator[None]:
        leave, enter = (self._swap_out, self._swap_in) if self._swap is not None else (self._swap_in, self._swap_out)
        leave()
        try:
            yield
        finally:
            enter()
