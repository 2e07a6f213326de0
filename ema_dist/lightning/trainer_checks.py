"""Checks that the callback supports a Trainer and its optimizers."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from ema_dist.averages.optimizer_hook import unwrap_optimizer
from ema_dist.sharding import Layout

SUPPORTED = (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)
UNSUPPORTED = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)
"""Some are subclasses of supported strategies, but keep weights or optimizers elsewhere."""


def require_supported(trainer: pl.Trainer, callback: Callback) -> None:
    """Raise MisconfigurationException unless the callback supports this Trainer, its strategy and its callbacks."""
    if not isinstance(trainer, pl.Trainer):
        raise MisconfigurationException(
            f"EMAWeightAveraging expected a lightning.pytorch.Trainer, got a {type(trainer).__module__}."
            f"{type(trainer).__qualname__}: import the Trainer and the LightningModule from lightning.pytorch"
        )
    others = [
        other
        for other in trainer.callbacks
        if other is not callback and isinstance(other, (WeightAveraging, StochasticWeightAveraging, type(callback)))
    ]
    if others:
        raise MisconfigurationException(
            "expected one callback that averages weights in a Trainer, found EMAWeightAveraging and "
            f"{[type(other).__qualname__ for other in others]}: each would average the other's averages. For several "
            'averages of one model pass EMAWeightAveraging(decay={"default": 0.999, "long": 0.9999})'
        )
    strategy = trainer.strategy
    if not isinstance(strategy, SUPPORTED) or isinstance(strategy, UNSUPPORTED):
        raise MisconfigurationException(
            f"EMAWeightAveraging does not support {type(strategy).__qualname__}: expected a single device, "
            "DDPStrategy, FSDPStrategy or ModelParallelStrategy. In place of DeepSpeed ZeRO-3, use FSDPStrategy or "
            "ModelParallelStrategy"
        )


def optimizers_of_averaged_parameters(
    optimizers: list[Optimizer], model: nn.Module, select: Callable[[str, Tensor], bool]
) -> list[Optimizer]:
    """Return the optimizers that step at least one averaged parameter, without Lightning's wrappers.

    Raises: MisconfigurationException when none does.
    """
    parameters = Layout(model, "copy").parameters
    averaged = {
        id(owner) for name, shard in parameters.items() if select(name, shard.owner) for owner in shard.owners.values()
    }
    found = [
        unwrap_optimizer(optimizer)
        for optimizer in optimizers
        if any(id(parameter) in averaged for group in optimizer.param_groups for parameter in group["params"])
    ]
    if not found:
        raise MisconfigurationException(
            f"expected an optimizer that steps averaged parameters, but none of the {len(optimizers)} optimizers does: "
            "return one from configure_optimizers(), or select the parameters that are optimized with select="
        )
    return found
