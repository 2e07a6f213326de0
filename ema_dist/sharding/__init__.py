"""Reads a model, however it is wrapped, into a `Layout` of `Shard`s, each with this rank's plain local tensor.

Code that names DDP, FSDP, DTensor or another wrapper, or a private attribute of torch, belongs here and nowhere else.
Code that knows averages, decays, kernels or checkpoint files does not belong here. Modules here import torch, the
standard library and each other, and nothing else of `ema_dist`.
"""

from ema_dist.sharding.compat import all_gather, untraced, world_store
from ema_dist.sharding.cpu_copies import cpu_copy, is_sharded, subclass_name
from ema_dist.sharding.ddp_wrap_detector import DDPWrapDetector
from ema_dist.sharding.devices import sending_device
from ema_dist.sharding.discovery import ReplicaPolicy
from ema_dist.sharding.gather_rows import as_bytes, merge_bytes
from ema_dist.sharding.layout import Layout
from ema_dist.sharding.memory import has_equal_bits, is_wrapper_subclass
from ema_dist.sharding.mesh_shard import local_tensor
from ema_dist.sharding.names import uncompiled_name
from ema_dist.sharding.plain_shard import ExpandedShard
from ema_dist.sharding.rank_sets import group_ranks
from ema_dist.sharding.shard import Shard
from ema_dist.sharding.substitution import Substitution, replays_cuda_graph, unsupported_reason

__all__ = [
    "DDPWrapDetector",
    "ExpandedShard",
    "Layout",
    "ReplicaPolicy",
    "Shard",
    "Substitution",
    "all_gather",
    "as_bytes",
    "cpu_copy",
    "group_ranks",
    "has_equal_bits",
    "is_sharded",
    "is_wrapper_subclass",
    "local_tensor",
    "merge_bytes",
    "replays_cuda_graph",
    "sending_device",
    "subclass_name",
    "uncompiled_name",
    "unsupported_reason",
    "untraced",
    "world_store",
]
