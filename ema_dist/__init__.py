"""Sharded exponential moving averages of model weights for PyTorch: DDP, FSDP1, FSDP2, HSDP and tensor parallelism.

Each rank stores its shards of the averages and updates them without communication. The averages can be swapped in for
evaluation, gathered on rank 0, and saved and resharded by ``torch.distributed.checkpoint``. Start with `ShardedEMA`.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ema_dist.averages.initial_weights import InitialWeightsWarning, OptimizerHookWarning
    from ema_dist.averages.offload import Offloaded
    from ema_dist.averages.precision import Compensated, Stochastic
    from ema_dist.ema import ShardedEMA
    from ema_dist.functional import compute_ema
    from ema_dist.schedules.laws import (
        Cosine,
        ExponentialWarmup,
        HalfLife,
        InverseGamma,
        Power,
        Uniform,
        Warmup,
    )
    from ema_dist.schedules.schedule import Schedule

__all__ = [
    "Compensated",
    "Cosine",
    "ExponentialWarmup",
    "HalfLife",
    "InitialWeightsWarning",
    "InverseGamma",
    "Offloaded",
    "OptimizerHookWarning",
    "Power",
    "Schedule",
    "ShardedEMA",
    "Stochastic",
    "Uniform",
    "Warmup",
    "compute_ema",
]
__version__ = "0.2.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # the program decides where messages go

# The module that defines each public name. It is imported when the name is first used, because the help text and the
# shell completion of `ema-dist` import this package too, and importing torch would take longer than either of them.
_DEFINING_MODULES = {
    "Compensated": "ema_dist.averages.precision",
    "Cosine": "ema_dist.schedules.laws",
    "ExponentialWarmup": "ema_dist.schedules.laws",
    "HalfLife": "ema_dist.schedules.laws",
    "InitialWeightsWarning": "ema_dist.averages.initial_weights",
    "InverseGamma": "ema_dist.schedules.laws",
    "Offloaded": "ema_dist.averages.offload",
    "OptimizerHookWarning": "ema_dist.averages.initial_weights",
    "Power": "ema_dist.schedules.laws",
    "Schedule": "ema_dist.schedules.schedule",
    "ShardedEMA": "ema_dist.ema",
    "Stochastic": "ema_dist.averages.precision",
    "Uniform": "ema_dist.schedules.laws",
    "Warmup": "ema_dist.schedules.laws",
    "compute_ema": "ema_dist.functional",
}

if not TYPE_CHECKING:  # a type checker that sees a module's `__getattr__` accepts any name

    def __getattr__(name: str) -> object:
        if name not in _DEFINING_MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_DEFINING_MODULES[name]), name)
        globals()[name] = value  # later uses find it without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
