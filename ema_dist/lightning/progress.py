"""When the averages are updated, counted in the optimizer steps of one fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl


@dataclass
class Progress:
    """The optimizer steps of a fit, and the last update."""

    steps: int = 0
    """Batches after which an averaged parameter was stepped, without skipped ones."""
    steps_at_update: int = 0
    """`steps` at the last update."""
    latest_update_step: int = 0
    """``trainer.global_step`` at the last update, which Lightning's own callback reads; 0 if there was none."""
    latest_epoch: int = -1
    """The last epoch after which the averages were updated, if that was due."""
    is_loaded: bool = False
    """Whether a checkpoint by this callback gave all numbers; else `fill` takes them from the Trainer."""

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> Progress:
        """The progress in a checkpoint by this callback or by Lightning's own, which has one number only."""
        return cls(**state) if "steps" in state else cls(latest_update_step=state["latest_update_step"])

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return asdict(self) | {"is_loaded": True}

    def fill(self, trainer: pl.Trainer) -> None:
        """Continue from the steps and epochs of the Trainer, unless they were loaded.

        ``trainer.global_step`` counts the steps of every optimizer, and those that a gradient scaler skipped.
        """
        if not self.is_loaded:
            optimizers = max(1, len(trainer.optimizers))
            self.steps = trainer.global_step // optimizers
            self.steps_at_update = self.latest_update_step // optimizers
            self.latest_epoch = trainer.current_epoch - 1

    def elapsed(self) -> int:
        """Optimizer steps since the last update, at least 1; and 1 at the first update, where averaging begins."""
        return max(1, self.steps - self.steps_at_update) if self.latest_update_step else 1

    def note_update(self, trainer: pl.Trainer) -> None:
        """Record that the averages were updated now."""
        self.steps_at_update = self.steps
        self.latest_update_step = trainer.global_step
