"""Averages as another package has stored them: their tensors, counts and averaging law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.importing.named_tensors import NamedTensors
from ema_dist.schedules.decay import DecayRecord, record_counts
from ema_dist.schedules.schedule import Schedule

Kind = Literal["averaged-model", "lightning", "timm", "diffusers", "ema-pytorch", "composer", "torchtitan", "nemo"]


@dataclass(frozen=True)
class Counts:
    """How many steps the averages cover, and the law by which they were averaged."""

    steps: int = 0
    updates: int = 0
    start: int = 0
    """The number of first steps that only copy the live weights; it may exceed `steps`."""
    law: Schedule | None = None
    """None if the file does not record it."""
    are_recorded: bool = True
    """Whether the file holds counts; if not, they are 0."""

    @classmethod
    def of_each_step(cls, steps: int, *, start: int = 0, law: Schedule | None = None) -> Counts:
        """The counts of averages that were updated at each step after ``start``."""
        return cls(steps, max(0, steps - start), start, law)

    def record(self) -> DecayRecord:
        """The law and the clock as a state of `ShardedEMA` holds them."""
        has_average = self.updates > 0 or not self.are_recorded
        return record_counts(self.law, steps=self.steps, start=self.start, has_average=has_average)


@dataclass(frozen=True)
class ForeignAverages:
    """The averages in one file or folder by another package."""

    kind: Kind
    path: Path
    tensors: NamedTensors | None
    """By the names of the unwrapped model; None if the file has no names."""
    listed: Sequence[Tensor] = ()
    """In the order of the model's parameters, if the file has no names."""
    counts: Counts = field(default_factory=lambda: Counts(are_recorded=False))
    buffers: frozenset[str] | None = None
    """The names of buffers; None if the file does not distinguish them from parameters."""

    @property
    def notes(self) -> list[str]:
        """What a user should know before resuming from these averages."""
        if self.counts.are_recorded:
            return []
        note = (
            f"{self.path} does not record how many steps its averages cover, so steps and updates are 0. The first "
            "update by a law that depends on the step (Warmup, Uniform, Power, InverseGamma), or before start=, then "
            "replaces the averages by the live weights: pass the number of steps (--steps N, steps=N)"
        )
        return [note]

    def with_steps(self, steps: int | None) -> ForeignAverages:
        """The same averages with this number of steps; None keeps the counts.

        Raises: CheckpointError when the file records its number of steps.
        """
        if steps is None:
            return self
        if self.counts.are_recorded:
            raise CheckpointError(
                f"{self.path} records that its averages cover {self.counts.steps} steps, got steps={steps}: leave out "
                "steps= (--steps)"
            )
        return replace(self, counts=Counts.of_each_step(steps))
