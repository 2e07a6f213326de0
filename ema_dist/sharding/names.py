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

from ema_dist.sharding.registries import resolve_live


@dataclass(frozen=True)
class NamedModule:
    """One module at one canonical place; a shared module has several.

    Args:
        prefix: what ``state_dict()`` puts before the module's own names: empty, or ending in a dot.
        replicas: DDP's process group, when the module is inside DDP.
        unsynchronised: ids of the parameters and buffers that DDP was told to ignore.
    """

    module: nn.Module
    prefix: str = ""
    replica_group: ProcessGroup | None = None
    ignored_ids: frozenset[int] = frozenset()


def named_modules(parent: NamedModule) -> Iterator[NamedModule]:
    """Every module under ``at`` in the order of ``state_dict()``; wrappers are passed through, not named."""
    inner = unwrap_once(parent.module)
    if inner is not None:
        replica_group, ignored_ids = parent.replica_group, parent.ignored_ids
        if isinstance(parent.module, DistributedDataParallel):
            replica_group, ignored_ids = parent.module.process_group, ddp_ignored_ids(parent.module)
        yield from named_modules(NamedModule(inner, parent.prefix, replica_group, ignored_ids))
        return
    yield parent
    for name, child in children(parent.module):
        yield from named_modules(
            NamedModule(child, f"{parent.prefix}{name}.", parent.replica_group, parent.ignored_ids)
        )


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


def ddp_ignored_ids(ddp: DistributedDataParallel) -> frozenset[int]:
    """Ids of the tensors that DDP does not keep identical, because the user asked so."""
    ignored_names = set(getattr(ddp, "parameters_to_ignore", ()))
    named: list[tuple[str, Tensor]] = [*ddp.module.named_parameters(), *ddp.module.named_buffers()]
    return frozenset(id(resolve_live(tensor)) for name, tensor in named if name in ignored_names)
