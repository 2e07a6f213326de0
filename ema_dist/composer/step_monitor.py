"""Whether optimizers have really stepped: a gradient scaler leaves steps out, and Composer's events do not tell."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ema_dist.averages.optimizer_hook import OptimizerHook


class StepMonitor:
    """The real steps of some optimizers since `consume` was called last.

    Args:
        before: whether there were some before this began to count.
    """

    def __init__(self, optimizers: Iterable[Optimizer], *, has_stepped: bool) -> None:
        self.optimizers = list(optimizers)
        self._handles = [OptimizerHook(optimizer, self._record_step) for optimizer in self.optimizers]
        self._has_stepped = has_stepped
        self._found_inf: Tensor | None = None

    def consume(self) -> tuple[bool, Tensor | None]:
        """Whether there was one; and if only the device knows, a tensor that is not zero when all were left out."""
        result = self._has_stepped, self._found_inf
        self._has_stepped, self._found_inf = False, None
        return result

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _record_step(self, found_inf: Tensor | None) -> None:
        known = found_inf is None or (self._has_stepped and self._found_inf is None)
        if known:
            self._found_inf = None
        else:
            assert found_inf is not None
            self._found_inf = found_inf if self._found_inf is None else torch.minimum(self._found_inf, found_inf)
        self._has_stepped = True
