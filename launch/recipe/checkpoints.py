"""Checkpoints of a training run: saving, and resuming from the newest one."""

from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from ema_dist import checkpoint

from .metrics import EpochMetrics


@dataclass
class TrainingProgress:
    """The learning rate schedule and the metrics of finished epochs: a DCP `Stateful`."""

    lr_scheduler: LRScheduler
    rows: list[EpochMetrics] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": self.lr_scheduler.state_dict(), "rows": [asdict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lr_scheduler.load_state_dict(state_dict["schedule"])
        self.rows = [EpochMetrics(**row) for row in state_dict["rows"]]


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of `state` in the folder `root`; without a folder, nothing is saved or loaded."""

    root: Path | None
    state: MutableMapping[str, Any]

    def resume(self, *, is_requested: bool) -> str:
        """Load the newest intact checkpoint, if there is one; returns a message that says where the run starts.

        Collective: every rank. Raises: ValueError if there is a checkpoint and `is_requested` is false.
        """
        newest_step = checkpoint.latest(self.root) if self.root else None
        if self.root is None or newest_step is None:
            return "starting from the beginning" + (f": no checkpoint in {self.root}" if is_requested else "")
        if not is_requested:
            raise ValueError(
                f"step {newest_step} in {self.root} is from an earlier run: pass --resume to continue it or another "
                "--checkpoint-dir"
            )
        return f"continuing from step {checkpoint.load(self.state, self.root)} in {self.root}"

    def save(self, step: int, *, block: bool) -> None:
        """Save, in the background unless `block`. Collective: every rank. A failure of the previous save is ignored."""
        if self.root:
            with suppress(checkpoint.CheckpointError):  # logged when it failed; this save is the next attempt
                checkpoint.wait()
            checkpoint.save(self.state, self.root, step=step, block=block)
