"""Functions whose names differ between versions of torch."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import Store

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Concatenates the tensors of all ranks; the older name of this function warns since torch 2.13."""


def world_store() -> Store:
    """The store of the default process group, which all ranks can use without a collective."""
    world = dist.group.WORLD
    if hasattr(world, "get_group_store"):
        return world.get_group_store()
    # Before torch 2.7 only this private function returns the store.
    return dist.distributed_c10d._get_default_store()
