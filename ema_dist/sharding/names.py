"""Canonical names: what the unwrapped model's ``state_dict()`` says, whatever has been wrapped around its modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper  # no public name
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ema_dist.sharding.registries import live_behind


@dataclass(frozen=True)
class Place:
    """One module at one canonical place; a shared module has several.

    Args:
        prefix: what ``state_dict()`` puts before the module's own names: empty, or ending in a dot.
        replicas: DDP's process group, when the module is inside DDP.
        unsynchronised: ids of the parameters and buffers that DDP was told to ignore.
    """

    module: nn.Module
    prefix: str = ""
    replicas: ProcessGroup | None = None
    unsynchronised: frozenset[int] = frozenset()


def places(at: Place) -> Iterator[Place]:
    """Every module under ``at`` in the order of ``state_dict()``; wrappers are passed through, not named."""
    inner = unwrap_once(at.module)
    if inner is not None:
        replicas, unsynchronised = at.replicas, at.unsynchronised
        if isinstance(at.module, DistributedDataParallel):
            replicas, unsynchronised = at.module.process_group, ignored_by_ddp(at.module)
        yield from places(Place(inner, at.prefix, replicas, unsynchronised))
        return
    yield at
    for name, child in children(at.module):
        yield from places(Place(child, f"{at.prefix}{name}.", at.replicas, at.unsynchronised))


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children by name, repeated ones included, as ``state_dict()`` visits them."""
    # named_children() leaves repeats out, and state_dict() does not: only the registry itself has them all.
    return ((name, child) for name, child in module._modules.items() if child is not None)


def unwrap_once(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper that adds a segment to names; None for any other module."""
    if isinstance(module, (DistributedDataParallel, DataParallel, FullyShardedDataParallel)):
        return module.module
    if isinstance(module, ActivationWrapper):
        return module._checkpoint_wrapped_module
    # torch._dynamo takes a second to import, and without it nothing can have been compiled.
    if (dynamo := sys.modules.get("torch._dynamo")) and isinstance(module, dynamo.OptimizedModule):
        return module._orig_mod
    return None


def ignored_by_ddp(ddp: DistributedDataParallel) -> frozenset[int]:
    """Ids of the tensors that DDP does not keep identical, because the user asked so."""
    ignored = set(getattr(ddp, "parameters_to_ignore", ()))
    named: list[tuple[str, Tensor]] = [*ddp.module.named_parameters(), *ddp.module.named_buffers()]
    return frozenset(id(live_behind(tensor)) for name, tensor in named if name in ignored)
