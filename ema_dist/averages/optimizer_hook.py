"""Updating after each real step of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from inspect import currentframe, unwrap
from types import CodeType
from typing import Any
from weakref import finalize

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ema_dist.sharding import local_tensor


class OptimizerHook:
    """Calls ``update(found_inf)`` after each step of ``optimizer`` that was meant to train, until `remove`.

    Args:
        update: its argument is None, or a device tensor that is not zero when a gradient scaler told a fused
            optimizer to leave this step out.
        before_steps: is called before each step of any optimizer, and by `remove`. All optimizers keep it, so it should
            not keep the averages.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        update: Callable[[Tensor | None], None],
        before_steps: Callable[[], None] | None = None,
    ) -> None:
        self._update = update
        self._codes = _step_codes(optimizer)
        self._before_steps = before_steps
        self._handles = [optimizer.register_step_post_hook(self._after_step)]
        if before_steps:
            # Of all optimizers: with several, the others write to the same weights before this one does.
            pre_hook = register_optimizer_step_pre_hook(lambda *_: before_steps())
            finalize(self, pre_hook.remove)
            self._handles.append(pre_hook)
        self.is_active = True

    def remove(self) -> None:
        """Stop; the averages stay as they are."""
        for handle in self._handles:
            handle.remove()
        if self._before_steps:
            self._before_steps()
        self.is_active = False

    def _after_step(self, optimizer: Optimizer, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_inner = len(self._codes) > 1 and _is_inside_step(optimizer, self._codes)
        if not (is_inner or _is_dummy_step(optimizer, kwargs)):
            # GradScaler sets found_inf for the time of the step on optimizers that skip by themselves (fused ones).
            self._update(getattr(optimizer, "found_inf", None))


def _step_codes(optimizer: Optimizer) -> set[CodeType]:
    """Of the ``step`` methods of its classes, as they were written."""
    step_methods = [
        vars(cls)["step"] for cls in type(optimizer).__mro__ if "step" in vars(cls) and cls is not Optimizer
    ]
    return {unwrap(step).__code__ for step in step_methods}


def _is_inside_step(optimizer: Optimizer, codes: set[CodeType]) -> bool:
    """Whether a ``step`` is still going on that called the one which ends: torch runs the hooks after either."""
    frame = currentframe()
    while frame is not None:
        if frame.f_code in codes and frame.f_locals.get(frame.f_code.co_varnames[0]) is optimizer:
            return True
        frame = frame.f_back
    return False


def _is_dummy_step(optimizer: Optimizer, kwargs: dict[str, Any]) -> bool:
    """Whether this step moved nothing: ``step(closure=None)`` with learning rates and gradients that are all zero.

    ``torch.distributed.checkpoint.state_dict`` takes one on an optimizer without state, before saving and loading.
    """
    if kwargs.get("closure", optimizer) is not None:
        return False
    learning_rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return not any(learning_rates) and not any(local_tensor(grad).any() for grad in gradients if grad is not None)
