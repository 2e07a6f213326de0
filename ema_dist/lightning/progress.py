"""Counts the optimizer steps of a fit, and records when the averages were updated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl


@dataclass
class Progress:
    """The optimizer steps of a fit, and the last update."""

    steps: int = 0
    """The batches in which an optimizer stepped averaged parameters, without those that a gradient scaler skipped."""
    steps_at_update: int = 0
    """`steps` at the last update."""
    latest_update_step: int = 0
    """``trainer.global_step`` at the last update, which Lightning's own callback reads; 0 if there was none."""
    latest_epoch: int = -1
    """The last epoch at whose end an update was made, or was not due; -1 before the first."""
    is_loaded: bool = False
    """Whether a checkpoint of this callback set all fields; if not, `fill` takes them from the Trainer."""

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> Progress:
        """Load progress saved by this callback or by Lightning's own, which saves only ``latest_update_step``."""
        return cls(**state) if "steps" in state else cls(latest_update_step=state["latest_update_step"])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return asdict(self) | {"is_loaded": True}

    def fill(self, trainer: pl.Trainer) -> None:
        """Take the steps and epochs from the Trainer, unless a checkpoint set them.

        ``trainer.global_step`` counts the steps of every optimizer, and those that a gradient scaler skipped. If
        optimizers step unequally often, the steps are approximate.
        """
        if not self.is_loaded:
            optimizers = max(1, len(trainer.optimizers))
            self.steps = trainer.global_step // optimizers
            self.steps_at_update = self.latest_update_step // optimizers
            self.latest_epoch = trainer.current_epoch - 1

    def elapsed(self) -> int:
        """Return the optimizer steps since the last update, at least 1; 1 at the first update."""
        return max(1, self.steps - self.steps_at_update) if self.latest_update_step else 1

    def note_update(self, trainer: pl.Trainer) -> None:
        """Record an update made now."""
        self.steps_at_update = self.steps
        self.latest_update_step = trainer.global_step
