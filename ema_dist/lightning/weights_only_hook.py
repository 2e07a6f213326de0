"""Saves the averages in checkpoints with ``save_weights_only=True``, for which Lightning calls no callback hook."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol
from weakref import ref

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

HOOK = "on_save_checkpoint"

SaveHook = Callable[[dict[str, Any]], None]


class SavesWeights(Protocol):
    """A callback that replaces the weights of a checkpoint."""

    def save_weights(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Replace the weights."""
        ...


def wrap_save_hook(module: pl.LightningModule, trainer: pl.Trainer, callback: SavesWeights) -> None:
    """Make ``module.on_save_checkpoint`` call ``callback.save_weights`` first, in weights-only checkpoints.

    Lightning calls no other hook for these checkpoints. The new hook refers to the callback weakly, because copying the
    module would otherwise copy the averages.
    """
    unwrap_save_hook(module)
    hook = getattr(module, HOOK, None)
    if hook is None:
        raise MisconfigurationException(
            f"expected LightningModule.{HOOK}, which Lightning {pl.__version__} lacks: without it checkpoints with "
            "save_weights_only=True would hold the live weights; install another version of Lightning"
        )
    setattr(module, HOOK, partial(_save, ref(callback), ref(trainer), hook))


def unwrap_save_hook(module: pl.LightningModule) -> None:
    """Undo `wrap_save_hook`, if it was called."""
    wrapped = vars(module).get(HOOK)
    if isinstance(wrapped, partial) and wrapped.func is _save:
        delattr(module, HOOK)


def _save(
    callback_ref: ref[SavesWeights], trainer_ref: ref[pl.Trainer], hook: SaveHook, checkpoint: dict[str, Any]
) -> None:
    callback, trainer = callback_ref(), trainer_ref()
    # Lightning adds the entry "callbacks" exactly when it also calls the hooks of callbacks.
    if callback is not None and trainer is not None and "callbacks" not in checkpoint:
        callback.save_weights(trainer, checkpoint)
    hook(checkpoint)
