"""When an average is taken and with which weight, also when skipped steps are counted on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ema_dist.schedules.decay import Decay


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
        self._steps = 0
        self._updates = 0
        self._device_counts: Tensor | None = None
        """Steps and updates counted on the device, on top of those counted on the host; None until the first."""

    @property
    def steps(self) -> int:
        """Optimizer steps seen, without skipped ones. Waits for the device if some were counted there."""
        return self._steps + self._device_count(0)

    @property
    def updates(self) -> int:
        """Averages taken. Waits for the device if some were counted there."""
        return self._updates + self._device_count(1)

    @property
    def update_index(self) -> int | Tensor:
        """As `updates`, but never waits: a tensor on the device if some were counted there."""
        return self._updates if self._device_counts is None else self._device_counts[1] + self._updates

    def set(self, *, steps: int, updates: int) -> None:
        """Continue from these counts."""
        self._steps, self._updates, self._device_counts = steps, updates, None

    def next_weights(self, found_inf: Tensor | None = None) -> dict[str, float] | dict[str, Tensor]:
        """Count one optimizer step. Returns the weight of the live value by track.

        A weight of 0 leaves the average unchanged, a weight of 1 replaces it by the live value.

        Args:
            found_inf: not zero if the optimizer skipped the step. The host never reads it, and so does not wait.
        """
        if found_inf is None and self._device_counts is None:
            self._steps += 1
            if self._steps <= self.start:
                return dict.fromkeys(self.decays, 1.0)
            if self._steps % self.interval:
                return dict.fromkeys(self.decays, 0.0)
            self._updates += 1
            return self._weights()
        return self._next_weights_on_device(found_inf)

    def _weights(self) -> dict[str, float]:
        return {name: 1 - decay.decay(self.interval) for name, decay in self.decays.items()}

    def _next_weights_on_device(self, found_inf: Tensor | None) -> dict[str, Tensor]:
        if self._device_counts is None:
            assert found_inf is not None
            self._device_counts = torch.zeros(2, dtype=torch.int64, device=found_inf.device)
        is_real_step = (
            torch.ones_like(self._device_counts[0]) if found_inf is None else (found_inf == 0).long().reshape(())
        )
        self._device_counts[0] += is_real_step
        step = self._device_counts[0] + self._steps
        is_before_start = is_real_step * (step <= self.start)
        is_update_due = (is_real_step - is_before_start) * (step % self.interval == 0)
        self._device_counts[1] += is_update_due
        return {name: is_before_start.double() + is_update_due * weight for name, weight in self._weights().items()}

    def _device_count(self, index: int) -> int:
        return 0 if self._device_counts is None else int(self._device_counts[index])
