"""Sharded exponential moving averages of model weights for PyTorch: DDP, FSDP1, FSDP2, HSDP and tensor parallelism.

The averages live as shards beside the live weights on every rank, are updated without communication, swapped in for
evaluation, gathered on rank 0, saved and resharded by ``torch.distributed.checkpoint``. Start with `ShardedEMA`.
"""

from ema_dist.averages.offload import Offloaded
from ema_dist.averages.precision import Compensated, Stochastic
from ema_dist.ema import ShardedEMA
from ema_dist.functional import compute_ema
from ema_dist.schedules.decay import HalfLife

__all__ = [
    "Compensated",
    "HalfLife",
    "Offloaded",
    "ShardedEMA",
    "Stochastic",
    "compute_ema",
]
__version__ = "0.1.0"
