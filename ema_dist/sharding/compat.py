"""Functions whose names differ between versions of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import Store
from torch.torch_version import TorchVersion

F = TypeVar("F", bound=Callable[..., Any])

all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Concatenates the tensors of all ranks; the older name of this function warns since torch 2.13."""

GATHERS_UNEVEN_STRIDED_SHARDS: bool = TorchVersion(torch.__version__) >= "2.11"
"""Whether DTensor gathers blocks that FSDP2 over tensor parallelism splits unevenly.

torch 2.9.1 exchanges rows and leaves some zero, without an error; 2.7 raises an error; 2.8 and 2.10 were not tried.
"""


def untraced(function: F) -> F:
    """Decorates a function so that ``torch.compile`` traces neither it nor the functions that it calls.

    The public ``torch.compiler.disable`` would load the compiler when it decorates, which takes seconds. This decorator
    loads it when the function is first called; constructing an optimizer has already loaded it by then.
    """
    return cast("F", torch._disable_dynamo(function))


def world_store() -> Store:
    """The store of the default process group, which all ranks can use without a collective."""
    world = dist.group.WORLD
    if hasattr(world, "get_group_store"):
        return world.get_group_store()
    # Before torch 2.7 only this private function returns the store.
    return dist.distributed_c10d._get_default_store()
