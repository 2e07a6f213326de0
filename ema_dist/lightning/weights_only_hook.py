"""Puts the averages into checkpoints with ``save_weights_only=True``, for which Lightning calls no callback."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakMethod, ref

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

HOOK = "on_save_checkpoint"

SaveHook = Callable[[dict[str, Any]], None]
SaveWeights = Callable[[pl.Trainer, dict[str, Any]], None]


def wrap_save_hook(module: pl.LightningModule, trainer: pl.Trainer, save_weights: SaveWeights) -> None:
    """Call ``save_weights(trainer, checkpoint)`` before the module's ``on_save_checkpoint``, if no callback was called.

    The module's hook is the only one that Lightning calls for these checkpoints.

    Args:
        save_weights: a method; the module does not keep its object alive, and can be copied.
    """
    unwrap_save_hook(module)
    hook = getattr(module, HOOK, None)
    if hook is None:
        raise MisconfigurationException(
            f"expected LightningModule.{HOOK}, which Lightning {pl.__version__} lacks: without it checkpoints with "
            "save_weights_only=True would hold the live weights; install another version of Lightning"
        )
    setattr(module, HOOK, partial(_save, WeakMethod(save_weights), ref(trainer), hook))


def unwrap_save_hook(module: pl.LightningModule) -> None:
    """Undo `wrap_save_hook`, if it was called."""
    wrapped = vars(module).get(HOOK)
    if isinstance(wrapped, partial) and wrapped.func is _save:
        delattr(module, HOOK)


def _save(
    save_weights: WeakMethod[SaveWeights], trainer: ref[pl.Trainer], hook: SaveHook, checkpoint: dict[str, Any]
) -> None:
    save, trainer_now = save_weights(), trainer()
    if save is not None and trainer_now is not None and "callbacks" not in checkpoint:
        save(trainer_now, checkpoint)
    hook(checkpoint)
