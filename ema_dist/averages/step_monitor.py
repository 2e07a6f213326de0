"""Whether optimizers have really stepped: a gradient scaler skips steps, and the events of trainers do not show it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ema_dist.averages.optimizer_hook import OptimizerHook


class StepMonitor:
    """Whether some optimizers have stepped since the last call of `consume`.

    Args:
        has_stepped: whether there were steps before the monitor was made.
    """

    def __init__(self, optimizers: Iterable[Optimizer], *, has_stepped: bool) -> None:
        self.optimizers: list[Optimizer] = list(optimizers)
        self._handles = [OptimizerHook(optimizer, self._record_step) for optimizer in self.optimizers]
        self._has_stepped = has_stepped
        self._found_inf: Tensor | None = None

    def consume(self) -> tuple[bool, Tensor | None]:
        """Whether there was a step; if only the device knows, also a tensor that is nonzero if all were skipped."""
        result = self._has_stepped, self._found_inf
        self._has_stepped, self._found_inf = False, None
        return result

    def remove(self) -> None:
        """Remove the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()

    def _record_step(self, found_inf: Tensor | None) -> None:
        is_certain = found_inf is None or (self._has_stepped and self._found_inf is None)
        if is_certain:
            self._found_inf = None
        else:
            assert found_inf is not None
            self._found_inf = found_inf if self._found_inf is None else torch.minimum(self._found_inf, found_inf)
        self._has_stepped = True
