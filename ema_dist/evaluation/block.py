"""The ``with`` block of `ShardedEMA.swapped` and `ShardedEMA.serving`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import nn

from ema_dist.messages import add_note
from ema_dist.modes import normal_mode

T = TypeVar("T")


def leave_after(error: BaseException | None, leave: Callable[[BaseException | None], None]) -> None:
    """Call ``leave(error)``. If that raises after an ``error``, the error gets a note instead."""
    try:
        leave(error)
    except Exception as failure:
        if error is None:
            raise
        add_note(error, f"Leaving the block failed, too: {failure}")


class EvaluationBlock(AbstractContextManager[nn.Module], ContextDecorator, Generic[T]):
    """A ``with`` block, or a decorated function, in which ``model`` computes with averages.

    The code inside runs in the caller's modes. If it raises and leaving fails too, its exception gets a note.

    Args:
        model: the value of ``with ... as``.
        enter: starts the swap or serving, and returns it.
        leave: ends the swap or serving, unless it has ended. Takes the exception that ended the code inside, or None.
        with_gradients: whether the code inside may record gradients, if the caller may.
    """

    def __init__(
        self,
        model: nn.Module,
        enter: Callable[[], T],
        leave: Callable[[T, BaseException | None], None],
        *,
        with_gradients: bool,
    ) -> None:
        self._model = model
        self._enter = enter
        self._leave = leave
        self._grad_mode: AbstractContextManager[object] = nullcontext() if with_gradients else torch.no_grad()
        self._entered: T | None = None

    def __enter__(self) -> nn.Module:
        with normal_mode():
            self._entered = self._enter()
        self._grad_mode.__enter__()
        return self._model

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._grad_mode.__exit__(None, None, None)
        entered, self._entered = self._entered, None
        if entered is None:
            return
        with normal_mode():
            leave_after(error, partial(self._leave, entered))
