"""The only code that knows wrappers: everyone else sees a `Layout` of `Shard`s of plain local tensors."""

from ema_dist.sharding.compat import all_gather, world_store
from ema_dist.sharding.cpu_copies import cpu_copy, is_cut
from ema_dist.sharding.find import Replicas, local_tensor
from ema_dist.sharding.layout import Layout
from ema_dist.sharding.shard import Shard, flat
from ema_dist.sharding.substitution import Stage, obstacle, replays_graphs

__all__ = [
    "Layout",
    "Replicas",
    "Shard",
    "Stage",
    "all_gather",
    "cpu_copy",
    "flat",
    "is_cut",
    "local_tensor",
    "obstacle",
    "replays_graphs",
    "world_store",
]
