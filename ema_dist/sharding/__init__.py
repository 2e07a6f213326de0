"""The only code that knows wrappers: everyone else sees a `Layout` of `Shard`s of plain local tensors."""

from ema_dist.sharding.compat import all_gather, world_store
from ema_dist.sharding.cpu_copies import cpu_copy, is_sharded
from ema_dist.sharding.discovery import ReplicaPolicy
from ema_dist.sharding.layout import Layout
from ema_dist.sharding.mesh_shard import local_tensor
from ema_dist.sharding.shard import Shard, flat_view
from ema_dist.sharding.substitution import Substitution, replays_cuda_graph, unsupported_reason

__all__ = [
    "Layout",
    "ReplicaPolicy",
    "Shard",
    "Substitution",
    "all_gather",
    "cpu_copy",
    "flat_view",
    "is_sharded",
    "local_tensor",
    "replays_cuda_graph",
    "unsupported_reason",
    "world_store",
]
