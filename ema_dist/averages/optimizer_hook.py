"""The hook that updates the averages after each real step of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from inspect import currentframe, unwrap
from types import CodeType
from typing import Any
from weakref import finalize

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ema_dist.sharding import local_tensor, untraced


class OptimizerHook:
    """Calls ``update(found_inf)`` after each training step of ``optimizer``, until `remove`.

    Args:
        update: takes None, or a device tensor that is nonzero if a gradient scaler made a fused optimizer skip the
            step.
        before_steps: called before each step of any optimizer, and by `remove`. torch holds a global reference to it,
            so it should not reference the averages.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        update: Callable[[Tensor | None], None],
        before_steps: Callable[[], None] | None = None,
    ) -> None:
        self._update = update
        self.optimizer_name: str = type(optimizer).__name__
        self.has_run = False
        """Whether the optimizer has taken a training step."""
        self._handles = [optimizer.register_step_post_hook(self._after_step)]
        self._step_codes = _step_codes(optimizer)
        self._before_steps = before_steps
        if before_steps:
            # A global hook: with several optimizers, the others write to the same weights before this one steps.
            pre_hook = register_optimizer_step_pre_hook(untraced(lambda *_: before_steps()))
            finalize(self, pre_hook.remove)
            self._handles.append(pre_hook)
        self.is_active = True

    def remove(self) -> None:
        """Stop updating; the averages keep their values."""
        for handle in self._handles:
            handle.remove()
        if self._before_steps:
            self._before_steps()
        self.is_active: bool = False

    # Untraced: torch.compile(optimizer.step) would otherwise compile updates, with counters as constants, and on a GPU
    # with streams and events.
    @untraced
    def _after_step(self, optimizer: Optimizer, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_inner_step = len(self._step_codes) > 1 and _is_inside_step(optimizer, self._step_codes)
        if not (is_inner_step or _is_dummy_step(optimizer, kwargs)):
            self.has_run: bool = True
            # GradScaler sets this attribute during the step of a (fused) optimizer that skips on the device.
            self._update(getattr(optimizer, "found_inf", None))


_WRAPPERS = {
    ("accelerate", "AcceleratedOptimizer"): "optimizer",
    ("lightning", "_FabricOptimizer"): "optimizer",
    ("lightning_fabric", "_FabricOptimizer"): "optimizer",
    ("lightning", "LightningOptimizer"): "optimizer",
    ("pytorch_lightning", "LightningOptimizer"): "optimizer",
}
"""The attribute that holds the wrapped optimizer, by the package and the name of the wrapper class.

The class is checked because learning-rate schedulers have an attribute of this name, too.
"""


def unwrap_optimizer(optimizer: object) -> Optimizer:
    """The optimizer whose hooks torch runs, without the wrappers of accelerate, Fabric and Lightning.

    Raises: TypeError or ValueError if its steps cannot be counted, or if it keeps its own average. The message says
        what to do instead.
    """
    while attribute := _wrapping_attribute(optimizer):
        optimizer = getattr(optimizer, attribute)
    groups = getattr(optimizer, "param_groups", ())
    name = type(optimizer).__name__
    if hasattr(optimizer, "train_mode") or any("train_mode" in group for group in groups):
        raise ValueError(
            f"{name} is schedule-free: it keeps its own average, and the parameters hold that average only after "
            "its eval(). Instead of attach(), call its eval(), then ema.update(), then its train()"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got a {name}: {_advice(optimizer)}")
    try:
        optimizer.register_step_post_hook(lambda *_: None).remove()
    except AttributeError:
        raise ValueError(
            f"{name} did not call Optimizer.__init__(), so torch runs no hooks after its steps: {_advice(optimizer)}"
        ) from None
    return optimizer


def _wrapping_attribute(optimizer: object) -> str | None:
    classes = ((cls.__module__.split(".")[0], cls.__qualname__) for cls in type(optimizer).__mro__)
    return next((_WRAPPERS[cls] for cls in classes if cls in _WRAPPERS), None)


def _advice(holder: object) -> str:
    if isinstance(holder, nn.Module):
        return "pass the optimizer that trains the model, or call ema.update() after each optimizer step"
    held = [(name, value) for name, value in getattr(holder, "__dict__", {}).items() if isinstance(value, Optimizer)]
    if held:
        return f"attach the {type(held[0][1]).__name__} in its attribute {held[0][0]!r}"
    return "call ema.update() after each of its steps"


def _step_codes(optimizer: Optimizer) -> set[CodeType]:
    """The code objects of the ``step`` methods of all its classes, without the decorators that torch adds."""
    step_methods = [
        vars(cls)["step"] for cls in type(optimizer).__mro__ if "step" in vars(cls) and cls is not Optimizer
    ]
    return {unwrap(step).__code__ for step in step_methods}


def _is_inside_step(optimizer: Optimizer, codes: set[CodeType]) -> bool:
    """Whether another ``step`` of this optimizer is still running, as when ``step`` calls ``super().step()``.

    torch runs the post-hooks after the inner and after the outer step.
    """
    frame = currentframe()
    while frame is not None:
        if frame.f_code in codes and frame.f_locals.get(frame.f_code.co_varnames[0]) is optimizer:
            return True
        frame = frame.f_back
    return False


def _is_dummy_step(optimizer: Optimizer, kwargs: dict[str, Any]) -> bool:
    """Whether this step changed no weight: ``step(closure=None)`` with zero learning rates and zero gradients.

    ``torch.distributed.checkpoint.state_dict`` takes such a step to initialize an optimizer before saving or loading.
    """
    if kwargs.get("closure", optimizer) is not None:
        return False
    learning_rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return not any(learning_rates) and not any(local_tensor(grad).any() for grad in gradients if grad is not None)
