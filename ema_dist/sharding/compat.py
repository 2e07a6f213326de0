"""What versions of torch name differently."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import Store

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Every rank's tensor, one after the other, into one; the older name of the same call warns since torch 2.13."""


def world_store() -> Store:
    """The store of the default process group: every rank reaches it, and no collective is needed to use it."""
    world = dist.group.WORLD
    if hasattr(world, "get_group_store"):
        return world.get_group_store()
    # Before torch 2.7 only this private function gives it.
    return dist.distributed_c10d._get_default_store()
