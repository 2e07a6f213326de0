"""The key-value store through which the ranks of a process group found each other."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import Store


def world_store() -> Store:
    """The store of the default process group: every rank reaches it, and no collective is needed to use it."""
    world = dist.group.WORLD
    if hasattr(world, "get_group_store"):
        return world.get_group_store()
    # Before torch 2.7 only this private function gives it.
    return dist.distributed_c10d._get_default_store()
