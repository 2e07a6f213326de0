"""The only code that knows wrappers: everyone else sees a `Layout` of `Shard`s of plain local tensors."""

from ema_dist.shards.compat import all_gather, world_store
from ema_dist.shards.find import Replicas, local_tensor
from ema_dist.shards.layout import Layout
from ema_dist.shards.shard import Shard, flat
from ema_dist.shards.stage import Stage, obstacle, replays_graphs
from ema_dist.shards.staging import cpu_copy, is_cut

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
