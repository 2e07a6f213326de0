"""Noticing that a model is no longer the one that was read, at every step and for next to nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ema_dist.sharding.fsdp1 import handles, local_shard
from ema_dist.sharding.mesh_shard import quick_local
from ema_dist.sharding.registries import RegistryEntry, resolve_live


class ChangeDetector:
    """Compares modules and storage addresses with what they were, in a few passes that run in C.

    Without it an average would go on following a tensor that the model has put aside (``.to()``, ``assign=True``,
    offloading, a replaced module). An address says enough: the storage that the average follows is kept alive by it,
    so no other tensor can come to lie there. What is added to a module without children, or put where None was, is not
    noticed here but when the model is read again.
    """

    def __init__(self, model: nn.Module, parameter_entries: list[RegistryEntry]) -> None:
        self._children = [module._modules.values() for module in model.modules() if module._modules]
        self._modules = list(chain.from_iterable(self._children))
        dtensors = [entry for entry in parameter_entries if isinstance(entry.registry[entry.name], DTensor)]
        self._dtensors = _RegistryReader(dtensors)
        self._plain = _RegistryReader(
            [entry for entry in parameter_entries if not isinstance(entry.registry[entry.name], DTensor)]
        )
        self._handles = [handle for _, handle in handles(model)]
        live = map(resolve_live, self._plain.current()), map(resolve_live, self._dtensors.current())
        self._addresses = self._addresses_of(*live)
        self._live_tensors = [resolve_live(tensor) for tensor in (*self._plain.current(), *self._dtensors.current())]

    def has_changed(self) -> bool:
        """Whether a module or parameter was replaced or removed, or lies in other storage."""
        if list(chain.from_iterable(self._children)) != self._modules:
            return True
        try:
            return self._addresses_of(self._plain.current(), self._dtensors.current()) != self._addresses
        except (AttributeError, TypeError):  # a sharded parameter has become a plain one, or one is gone
            return True

    def has_replaced_params(self) -> bool:
        """Whether modules now show other parameters, wherever these lie: an optimizer built since steps them alone."""
        return not all(map(is_, chain(self._plain.current(), self._dtensors.current()), self._live_tensors))

    @property
    def has_flat_parameters(self) -> bool:
        """Whether FSDP1 is among what is watched."""
        return bool(self._handles)

    def _addresses_of(self, plain: Iterable[Any], dtensors: Iterable[Any]) -> list[int]:
        tensors = chain(plain, map(quick_local, dtensors), map(local_shard, self._handles))
        return list(map(torch.Tensor.data_ptr, tensors))


class _RegistryReader:
    """Reads registries: whole ones at once where all that they hold is asked for."""

    def __init__(self, registry_entries: list[RegistryEntry]) -> None:
        names_by_registry: dict[
            int, tuple[dict[str, Any], dict[str, None]]
        ] = {}  # a shared module lists its sites at each place
        for _, registry, name in registry_entries:
            names_by_registry.setdefault(id(registry), (registry, {}))[1][name] = None
        self._full_registries = [
            registry.values() for registry, names in names_by_registry.values() if len(names) == len(registry)
        ]
        single_entries = [
            (registry, name)
            for registry, names in names_by_registry.values()
            if len(names) < len(registry)
            for name in names
        ]
        self._registries = [registry for registry, _ in single_entries]
        self._names = [name for _, name in single_entries]

    def current(self) -> Iterator[Any]:
        return chain(chain.from_iterable(self._full_registries), map(dict.get, self._registries, self._names))
