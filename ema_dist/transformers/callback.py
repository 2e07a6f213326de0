"""A callback for the Trainer: updates averages in training, swaps them in for evaluation, saves them in checkpoints."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ema_dist import checkpoint
from ema_dist.accelerate import save_averages, start_from_weights
from ema_dist.averages.optimizer_hook import OptimizerHook
from ema_dist.communication.rendezvous import rendezvous
from ema_dist.ema import ShardedEMA
from ema_dist.evaluation.swap import active_swaps
from ema_dist.schedules.decay import require_default_track

T = TypeVar("T")

FOLDER = "ema"
"""The folder of the averages in each ``checkpoint-N``."""


class EMACallback(TrainerCallback):
    """Averages the weights that a `Trainer` trains: ``ema = EMACallback(decay=...).bind(trainer)``.

    Training uses the live weights; evaluation and prediction use the averages. Each ``checkpoint-N`` has the live
    weights as without this callback, and the averages in ``checkpoint-N/ema``; ``resume_from_checkpoint`` and
    ``load_best_model_at_end`` load both. ``trainer.save_model()`` and `save_pretrained` write the averages.

    Args:
        settings: the keyword arguments of `ShardedEMA`.

    Collective: over all ranks of the Trainer, at the start of training, in evaluation, and whenever it saves or loads.
    Memory: as `ShardedEMA`; with PEFT, that of the adapters' averages.
    Raises: TypeError for an unknown setting.
    """

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401  they are ShardedEMA's
        inspect.signature(ShardedEMA).bind(None, **settings)
        require_default_track(settings.get("decay"))
        self.ema: ShardedEMA | None = None
        """The averages; each ``train()`` makes new ones at its start. None before the first."""
        self._settings = settings
        self._trainer: Trainer | None = None
        self._optimizer_hook: OptimizerHook | None = None
        self._resumed_folder: Path | None = None
        self._run_folder: Path | None = None
        self._evaluates_live = False

    def bind(self, trainer: Trainer) -> EMACallback:
        """Add this callback to a `Trainer` or a subclass of it, before ``train()``; returns the callback.

        It wraps the trainer's methods ``train``, ``evaluation_loop`` and ``save_model``, because no event precedes an
        evaluation or reports the checkpoint that is resumed.

        Collective: no.
        Raises: RuntimeError if it is bound already, or while the trainer is in ``train()``. ValueError if the trainer
            has another `EMACallback`, or settings that are not supported: DeepSpeed, and ``fp16_full_eval`` or
            ``bf16_full_eval``, which cast the live weights.
        """
        if self._trainer is not None:
            raise RuntimeError("this EMACallback is bound to a Trainer already: construct one per Trainer")
        if trainer.is_in_train:
            raise RuntimeError(
                "bind() was called after train() began, so the averages would lack the steps before: bind before "
                "train(). If an earlier train() raised, construct a new Trainer"
            )
        others = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, EMACallback)]
        if any(callback is not self for callback in others):
            raise ValueError(
                "this Trainer has another EMACallback, and both would put their averages into the model: use one with "
                "several tracks, EMACallback(decay={'default': ..., 'long': ...})"
            )
        _require_supported(trainer)
        if self not in others:
            trainer.add_callback(self)
        self._trainer = trainer
        _wrap_method(trainer, "train", self._train)
        _wrap_method(trainer, "evaluation_loop", self._evaluate)
        _wrap_method(trainer, "save_model", self._save_model)
        return self

    @contextmanager
    def live_weights(self) -> Iterator[None]:
        """In the block, evaluation, prediction and ``trainer.save_model()`` use the live weights. Collective: no."""
        before, self._evaluates_live = self._evaluates_live, True
        try:
            yield
        finally:
            self._evaluates_live = before

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the averaged model for ``from_pretrained``: with PEFT the adapter, else the weights and configuration.

        The tokenizer or processor is written, too.

        Collective: over all ranks; the main process writes.
        Memory: as `ShardedEMA.swapped`; under FSDP, the full model in the main process's CPU memory.
        Raises: RuntimeError before ``train()``; ValueError for a model without ``save_pretrained``.
        """
        trainer = self._require_trainer()
        if self.ema is None:
            raise RuntimeError("there are no averages before train(): call save_pretrained() after it")
        model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        if not hasattr(model, "save_pretrained"):
            raise ValueError(
                f"{type(model).__name__} has no save_pretrained(): write its averages by "
                "ema_dist.checkpoint.gather(callback.ema, folder)"
            )

        def save() -> None:
            full = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
            is_writer = trainer.args.should_save
            if is_writer or getattr(trainer, "is_distributed_loading_by_transformers", False):  # then it is collective
                model.save_pretrained(folder, state_dict=full, is_main_process=is_writer)
            if is_writer and trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)

        self._with_averages(save)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Constructs the averages, or loads those of the checkpoint that the Trainer resumes from."""
        # The first event at which the model is wrapped and, on resuming, has the weights of the checkpoint.
        trainer = self._require_trainer()
        self._detach()  # auto_find_batch_size restarts training within one train()
        self.ema = None  # frees the averages of an earlier train() before new ones are made
        ema = ShardedEMA(trainer.model_wrapped, **self._settings)
        if self._resumed_folder is not None:
            self._load(ema, self._resumed_folder)
        self._optimizer_hook = ema.attach(trainer.optimizer)
        self.ema = ema
        self._run_folder = Path(args.output_dir)
        self._correct_best_checkpoint(state)

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Raises: RuntimeError if the callback was never bound."""
        self._require_trainer()  # raises for an unbound callback that was added after on_train_begin

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Saves the averages beside the files of the Trainer, in ``checkpoint-N/ema``."""
        assert self.ema is not None
        assert self._run_folder is not None
        folder = self._run_folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # The first rank may still be writing the model, so wait as long as the Trainer's own barriers do.
        save_averages(self.ema, folder / FOLDER, step=state.global_step, timeout=args.ddp_timeout)
        self._correct_best_checkpoint(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Loads the averages of the best checkpoint, if the Trainer has loaded its live weights."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            assert self.ema is not None
            self._load(self.ema, Path(state.best_model_checkpoint))  # the Trainer has loaded the live weights

    def _require_trainer(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError(
                "this EMACallback is not bound to a Trainer, so it cannot average: call EMACallback(...).bind(trainer) "
                "before trainer.train(), instead of passing it in callbacks"
            )
        return self._trainer

    def _train(self, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  as the method
        trainer = self._require_trainer()
        resumed = args[0] if args else kwargs.get("resume_from_checkpoint")
        if resumed is True:
            resumed = get_last_checkpoint(str(trainer.args.output_dir))
        self._resumed_folder = Path(resumed) if resumed else None
        if self not in trainer.callback_handler.callbacks:  # removed since bind()
            self.ema = None
        try:
            return train(*args, **kwargs)
        finally:
            self._detach()

    def _evaluate(self, evaluation_loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        evaluate = partial(evaluation_loop, *args, **kwargs)
        return evaluate() if self._evaluates_live else self._with_averages(evaluate)

    def _save_model(
        self,
        save_model: Callable[..., None],
        output_dir: str | None = None,
        _internal_call: bool = False,  # noqa: FBT001, FBT002  as the Trainer calls it
    ) -> None:
        trainer = self._require_trainer()
        is_checkpoint = _internal_call and output_dir is not None  # push_to_hub passes no folder
        if is_checkpoint:
            self._run_folder = Path(output_dir).parent
        save = partial(save_model, output_dir, _internal_call)
        if is_checkpoint or self._evaluates_live or self.ema is None:
            save()
        elif _saves_only_shards(trainer):
            self.save_pretrained(output_dir or str(trainer.args.output_dir))
        else:
            self._with_averages(save)

    def _with_averages(self, call: Callable[[], T]) -> T:
        """Call it while the averages are in the model, if there are averages."""
        # No context manager of our own: warnings of swapped() would name a line of contextlib.
        if self.ema is None or active_swaps(self.ema.model):
            return call()
        self._meet_other_ranks()
        with self.ema.swapped():
            result = call()
            if self._ranks_wait:
                self._require_trainer().accelerator.wait_for_everyone()
        return result

    @property
    def _ranks_wait(self) -> bool:
        """Whether ranks wait for each other; not with ``replicas="copy"``, so that one may save alone under DDP."""
        return self._settings.get("replicas") != "copy" and dist.is_initialized()

    def _meet_other_ranks(self) -> None:
        """Wait as long as the Trainer's own collectives do: another rank may be uploading, or writing the model.

        The timeout of `ShardedEMA` is shorter, so that an exception on one rank soon ends all.
        """
        if self._ranks_wait:
            rendezvous(
                "evaluate(), predict(), save_model() or save_pretrained() with the averages of EMACallback",
                [*range(dist.get_world_size())],
                timeout=self._require_trainer().args.ddp_timeout,
                advice='call it on every rank; EMACallback(replicas="copy") lets one rank save alone under DDP',
            )

    def _load(self, ema: ShardedEMA, folder: Path) -> None:
        if (folder / FOLDER).is_dir():
            checkpoint.load({"ema": ema}, folder / FOLDER, timeout=self._require_trainer().args.ddp_timeout)
        else:
            start_from_weights(ema, folder)

    def _correct_best_checkpoint(self, state: TrainerState) -> None:
        """Set ``state.best_model_checkpoint`` to the folder of the best step, if it was saved.

        With FSDP and sharded checkpoints, the Trainer looks for that folder before creating it, and keeps an older one.
        """
        assert self._run_folder is not None
        best = self._run_folder / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)

    def _detach(self) -> None:
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
            self._optimizer_hook = None


def _require_supported(trainer: Trainer) -> None:
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "expected a Trainer with DDP or FSDP, got one with DeepSpeed, which is not supported: its engine steps the "
            "optimizer itself, and ZeRO-3 partitions the weights. Use FSDP2, TrainingArguments(fsdp=True)"
        )
    if trainer.args.fp16_full_eval or trainer.args.bf16_full_eval:
        raise ValueError(
            "fp16_full_eval and bf16_full_eval are not supported: an evaluation outside train() would cast the live "
            "weights in place. Pass fp16=True or bf16=True instead; evaluation then runs under autocast"
        )


def _saves_only_shards(trainer: Trainer) -> bool:
    """Whether the Trainer's ``save_model`` writes nothing, because FSDP saves shards, and only in checkpoints."""
    return bool(trainer.is_fsdp_enabled) and "FULL" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)


def _wrap_method(trainer: Trainer, name: str, wrapper: Callable[..., Any]) -> None:
    method = getattr(trainer, name)
    setattr(trainer, name, wraps(method)(partial(wrapper, method)))
