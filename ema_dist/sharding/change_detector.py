"""Detects, at every step and at little cost, that a model changed after it was read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ema_dist.sharding.fsdp1 import handles, local_shard
from ema_dist.sharding.mesh_shard import dtensor_local
from ema_dist.sharding.registries import RegistryEntry, resolve_live


class ChangeDetector:
    """Compares modules and storage addresses with those at construction, in a few loops that run in C.

    Without it, updates would read a tensor that the model no longer uses (after ``.to()``, ``assign=True``, offloading,
    or when a module was replaced). Comparing addresses suffices, because the shards keep the old storage alive, so that
    no other tensor can get its address. The first submodule of a module that had none, and a tensor that replaces None,
    are not detected here, but only when the model is read again.
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
        plain_live = list(map(resolve_live, self._plain.current()))
        dtensors_live = list(map(resolve_live, self._dtensors.current()))
        self._addresses = self._addresses_of(plain_live, dtensors_live)
        self._live_tensors = [*plain_live, *dtensors_live]

    def has_changed(self) -> bool:
        """Whether a module or parameter was replaced or removed, or has other storage."""
        if list(chain.from_iterable(self._children)) != self._modules:
            return True
        try:
            return self._addresses_of(self._plain.current(), self._dtensors.current()) != self._addresses
        except (
            AttributeError,
            TypeError,
        ):  # a plain tensor replaced a DTensor, or an entry is None or missing
            return True

    def has_replaced_params(self) -> bool:
        """Whether modules hold other parameter objects, perhaps with the same storage; a new optimizer steps those."""
        return not all(map(is_, chain(self._plain.current(), self._dtensors.current()), self._live_tensors))

    @property
    def has_flat_parameters(self) -> bool:
        """Whether the model has parameters that FSDP1 has flattened."""
        return bool(self._handles)

    def _addresses_of(self, plain: Iterable[Any], dtensors: Iterable[Any]) -> list[int]:
        tensors = chain(plain, map(dtensor_local, dtensors), map(local_shard, self._handles))
        return list(map(torch.Tensor.data_ptr, tensors))


class _RegistryReader:
    """Reads registry entries; if it must read all entries of a registry, it iterates over the registry itself."""

    def __init__(self, registry_entries: list[RegistryEntry]) -> None:
        # Names are keys, because a shared module lists its entries several times.
        names_by_registry: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
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
