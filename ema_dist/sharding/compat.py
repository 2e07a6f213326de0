"""Functions whose names differ between versions of torch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import Store
from torch.torch_version import TorchVersion

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Concatenates the tensors of all ranks; the older name of this function warns since torch 2.13."""

GATHERS_UNEVEN_STRIDED_SHARDS = TorchVersion(torch.__version__) >= "2.11"
"""Whether DTensor gathers blocks that FSDP2 over tensor parallelism splits unevenly.

torch 2.9.1 exchanges rows and leaves some zero, without an error; 2.7 refuses; 2.8 and 2.10 were not tried.
"""

untraced = torch._disable_dynamo
"""Decorates a function: ``torch.compile`` calls it as it is, and traces neither it nor what it calls.

The public ``torch.compiler.disable`` would load the compiler, which takes seconds, when it decorates; this does when
the function is first called. Constructing an optimizer has loaded it before that.
"""


def world_store() -> Store:
    """The store of the default process group, which all ranks can use without a collective."""
    world = dist.group.WORLD
    if hasattr(world, "get_group_store"):
        return world.get_group_store()
    # Before torch 2.7 only this private function returns the store.
    return dist.distributed_c10d._get_default_store()
