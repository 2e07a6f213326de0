"""When an average is taken and with which weight, also when skipped steps are counted on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ema_dist.schedules.decay import Decay


class Counts(NamedTuple):
    """Optimizer steps and averages taken; those that a device counted are the elements of a tensor there."""

    steps: int = 0
    updates: int = 0
    on_device: Tensor | None = None
    """An int64 tensor: steps and updates counted on the device, on top of the others; None until the first."""


class ClockStep(NamedTuple):
    """One optimizer step that is not counted yet."""

    weights: Mapping[str, float | Tensor]
    """The weight of the live value by track: 0 leaves the average unchanged, 1 replaces it by the live value."""
    counts: Counts
    """The counts that include this step."""

    @property
    def update_index(self) -> int | Tensor:
        """The number of this update: a tensor on the device if some were counted there."""
        _, updates, on_device = self.counts
        return updates if on_device is None else on_device[1] + updates


class Clock:
    """Counts optimizer steps and averages taken.

    Args:
        decays: the decay of each track, by name.
        start: until this step the average simply follows the live weights.
        interval: an average is taken at every step that is a multiple of it.

    Raises: ValueError for a negative ``start`` or an ``interval`` below 1.
    """

    def __init__(self, decays: Mapping[str, Decay], *, start: int, interval: int) -> None:
        if start < 0:
            raise ValueError(f"start is an optimizer step, 0 or later, got {start!r}")
        if interval < 1:
            raise ValueError(f"update_interval is a number of optimizer steps, 1 or more, got {interval!r}")
        self.decays = decays
        self.start = start
        self.interval = interval
        self._counts = Counts()

    @property
    def steps(self) -> int:
        """Optimizer steps seen, without skipped ones. Waits for the device if some were counted there."""
        steps, _, on_device = self._counts
        return steps if on_device is None else steps + int(on_device[0])

    @property
    def updates(self) -> int:
        """Averages taken. Waits for the device if some were counted there."""
        _, updates, on_device = self._counts
        return updates if on_device is None else updates + int(on_device[1])

    def set(self, *, steps: int, updates: int) -> None:
        """Continue from these counts."""
        self._counts = Counts(steps, updates)

    def next_step(self, found_inf: Tensor | None = None) -> ClockStep:
        """The next optimizer step; `count` counts it once its update is made.

        Args:
            found_inf: not zero if the optimizer skipped the step. The host never reads it, and so does not wait.
        """
        steps, updates, on_device = self._counts
        if found_inf is not None or on_device is not None:
            return self._next_step_on_device(found_inf)
        steps += 1
        if steps <= self.start:
            return ClockStep(dict.fromkeys(self.decays, 1.0), Counts(steps, updates))
        if steps % self.interval:
            return ClockStep(dict.fromkeys(self.decays, 0.0), Counts(steps, updates))
        return ClockStep(self._weights(), Counts(steps, updates + 1))

    def count(self, step: ClockStep) -> None:
        """Count ``step``; again without effect, if it is the last one counted."""
        self._counts = step.counts

    def _weights(self) -> dict[str, float]:
        return {name: 1 - decay.decay(self.interval) for name, decay in self.decays.items()}

    def _next_step_on_device(self, found_inf: Tensor | None) -> ClockStep:
        steps, updates, on_device = self._counts
        if on_device is None:
            assert found_inf is not None
            on_device = torch.zeros(2, dtype=torch.int64, device=found_inf.device)
        is_real_step = torch.ones_like(on_device[0]) if found_inf is None else (found_inf == 0).long().reshape(())
        step = on_device[0] + is_real_step + steps
        is_before_start = is_real_step * (step <= self.start)
        is_update_due = (is_real_step - is_before_start) * (step % self.interval == 0)
        # In float64: a product of an integer tensor and a number has the default dtype, which may be bfloat16.
        weights = {
            name: is_before_start.double() + is_update_due.double() * weight for name, weight in self._weights().items()
        }
        counts = Counts(steps, updates, on_device + torch.stack((is_real_step, is_update_due)))
        return ClockStep(weights, counts)
