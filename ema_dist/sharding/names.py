"""Canonical names: the names in the unwrapped model's ``state_dict()``, whatever wraps its modules."""

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

_WRAPPERS_BY_MODULE = {
    # Fabric's public `module` leaves out the DDP or FSDP around the model.
    "lightning.fabric.wrappers": ("_FabricModule", "_forward_module"),
    "lightning_fabric.wrappers": ("_FabricModule", "_forward_module"),
    "deepspeed.runtime.engine": ("DeepSpeedEngine", "module"),
}
"""Class and attribute of wrappers, by the module that defines them. Nothing is imported to find them."""


@dataclass(frozen=True)
class NamedModule:
    """A module under one canonical name; a shared module has several names.

    Args:
        prefix: the prefix of the module's tensors in ``state_dict()``: empty, or ending in a dot.
        replica_group: DDP's process group, if the module is inside DDP.
        ignored_ids: ids of the parameters and buffers that DDP was set to ignore.
    """

    module: nn.Module
    prefix: str = ""
    replica_group: ProcessGroup | None = None
    ignored_ids: frozenset[int] = frozenset()


def named_modules(parent: NamedModule) -> Iterator[NamedModule]:
    """Every module under ``parent`` in the order of ``state_dict()``; wrappers add nothing to names."""
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
    """Children by name, including repeated ones, as ``state_dict()`` visits them."""
    # named_children() skips repeated modules and state_dict() does not: only the private registry has all of them.
    return ((name, child) for name, child in module._modules.items() if child is not None)


def unwrap_once(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper that adds a segment to names; None for any other module."""
    if isinstance(module, (DistributedDataParallel, DataParallel, FullyShardedDataParallel)):
        return module.module
    if isinstance(module, ActivationWrapper):
        return module._checkpoint_wrapped_module
    # Importing torch._dynamo takes a second, and no model can be compiled before something has imported it.
    if (dynamo := sys.modules.get("torch._dynamo")) and isinstance(module, dynamo.OptimizedModule):
        return module._orig_mod
    for module_name, (name, attribute) in _WRAPPERS_BY_MODULE.items():
        if (wrapper := getattr(sys.modules.get(module_name), name, None)) and isinstance(module, wrapper):
            return getattr(module, attribute)
    return None


def uncompiled_name(name: str) -> str:
    """The name of a tensor in a ``state_dict()`` without the segments that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "")


def ddp_ignored_ids(ddp: DistributedDataParallel) -> frozenset[int]:
    """Ids of the tensors that DDP was set to ignore, so that replicas may differ in them."""
    ignored_names = set(getattr(ddp, "parameters_to_ignore", ()))
    named: list[tuple[str, Tensor]] = [*ddp.module.named_parameters(), *ddp.module.named_buffers()]
    return frozenset(id(resolve_live(tensor)) for name, tensor in named if name in ignored_names)
