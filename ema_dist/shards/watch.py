"""Noticing that a model is no longer the one that was read, at every step and for next to nothing."""

from __future__ import annotations

from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ema_dist.shards.find import Site, local_tensor
from ema_dist.shards.fsdp1 import handles, local_shard


class Watch:
    """Compares registries and storage addresses with what they were, in a few passes that run in C.

    Without it an average would go on following a tensor that the model has put aside (``.to()``, ``assign=True``,
    offloading, a replaced module).
    """

    def __init__(self, model: nn.Module, parameter_sites: list[Site]) -> None:
        modules = list(model.modules())
        children = [(module._modules, name) for module in modules for name in module._modules]
        sites: list[tuple[dict[str, Any], str]] = [*children, *parameter_sites]
        self._registries = [registry for registry, _ in sites]
        self._names = [name for _, name in sites]
        self._entries = list(map(dict.get, self._registries, self._names))
        self._growing = [kind for module in modules for kind in (module._modules, module._parameters, module._buffers)]
        self._lengths = list(map(len, self._growing))
        parameters = [registry[name] for registry, name in parameter_sites]
        self._plain = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        self._on_mesh = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
        self._handles = [handle for _, handle in handles(model)]
        self._addresses = self._current_addresses()

    def differs(self) -> bool:
        """Whether a module or parameter was added, replaced or removed, or lies in other storage."""
        return (
            not all(map(is_, map(dict.get, self._registries, self._names), self._entries))
            or list(map(len, self._growing)) != self._lengths
            or self._current_addresses() != self._addresses
        )

    def _current_addresses(self) -> list[int]:
        tensors = [*self._plain, *map(_local, self._on_mesh), *map(local_shard, self._handles)]
        return list(map(torch.Tensor.data_ptr, tensors))


# to_local() costs a microsecond per parameter and step; it is the fallback where the attribute is not there.
_local = attrgetter("_local_tensor") if "_local_tensor" in DTensor.__slots__ else local_tensor
