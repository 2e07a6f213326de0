"""Whether optimizers have really stepped: a gradient scaler leaves steps out, and Composer's events do not tell."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ema_dist.averages.optimizer_hook import Attachment


class StepsTaken:
    """The real steps of some optimizers since `take` was called last.

    Args:
        before: whether there were some before this began to count.
    """

    def __init__(self, optimizers: Iterable[Optimizer], *, before: bool) -> None:
        self.optimizers = list(optimizers)
        self._handles = [Attachment(optimizer, self._note) for optimizer in self.optimizers]
        self._any = before
        self._left_out: Tensor | None = None

    def take(self) -> tuple[bool, Tensor | None]:
        """Whether there was one; and if only the device knows, a tensor that is not zero when all were left out."""
        taken = self._any, self._left_out
        self._any, self._left_out = False, None
        return taken

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _note(self, found_inf: Tensor | None) -> None:
        known = found_inf is None or (self._any and self._left_out is None)
        if known:
            self._left_out = None
        else:
            assert found_inf is not None
            self._left_out = found_inf if self._left_out is None else torch.minimum(self._left_out, found_inf)
        self._any = True
