"""Who holds what: a model read into shards."""

from __future__ import annotations

from operator import attrgetter, is_

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ema_dist.shards import fsdp1
from ema_dist.shards.find import Replicas, Site, find, local_tensor
from ema_dist.shards.shard import Shard


class Layout:
    """The tensors of one model as this rank holds them, in the order of the unwrapped model's ``state_dict()``.

    Args:
        model: plain, or wrapped as a whole or in parts in any way `ema_dist` knows.
        replicas: ``"shard"`` splits among replicas what they hold alike, ``"copy"`` does not; a process group says
            that an unwrapped model is replicated over it, and splits.

    Raises: ValueError for a model on the meta device; RuntimeError where torch hides what must be read of FSDP1.
    """

    def __init__(self, model: nn.Module, replicas: Replicas = "shard") -> None:
        self.model = model
        self.reshard()
        self.parameters: dict[str, Shard] = {}
        self.buffers: dict[str, Shard] = {}
        self._parameter_sites: list[Site] = []
        self._buffer_sites: dict[str, Site] = {}
        found, self.extra_states = find(model, replicas)
        for tensor in found:
            shard = tensor.make(tuple(tensor.names))
            if shard.local.is_meta:
                raise ValueError(f"{shard.name!r} is on the meta device; materialise the model first")
            if tensor.is_buffer:
                self.buffers[shard.name] = shard
                self._buffer_sites[shard.name] = tensor.sites[0]
            else:
                self.parameters[shard.name] = shard
                self._parameter_sites += tensor.sites
        self._watch = _Watch(model, self._parameter_sites)

    @property
    def shards(self) -> list[Shard]:
        """Parameters, then buffers."""
        return [*self.parameters.values(), *self.buffers.values()]

    @property
    def ranks(self) -> list[int]:
        """The global ranks that hold this model together, in order; empty when this rank holds it alone."""
        sets = {shard.ranks | shard.part.ranks for shard in self.shards}
        sets |= {frozenset(dist.get_process_group_ranks(s.replicas)) for s in self.shards if s.replicas is not None}
        union = frozenset[int]().union(*sets)
        # Groups of which none holds all the others (DDP over TP, HYBRID_SHARD) reach further than one rank can see.
        return sorted(union) if not union or union in sets else list(range(dist.get_world_size()))

    @property
    def group(self) -> ProcessGroup | None:
        """The process group of exactly `ranks`; None for a model that this rank holds alone.

        Raises: RuntimeError when the model is spread over ranks that have no group of their own.
        """
        ranks = self.ranks
        if not ranks:
            return None
        groups = [dist.group.WORLD, *(g for s in self.shards for g in (s.part.group, s.group, s.replicas))]
        for group in groups:
            if group is not None and dist.get_process_group_ranks(group) == ranks:
                return group
        raise RuntimeError(f"the model is spread over ranks {ranks}, which have no process group of their own")

    def by_any_name(self) -> dict[str, Shard]:
        """Parameters and buffers under each of their names, tied ones included."""
        return {name: shard for shard in self.shards for name in shard.names}

    def reshard(self) -> None:
        """Drop weights that a forward pass left gathered, so that the next one reads the shards."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        fsdp1.reshard(self.model)

    def has_moved(self) -> bool:
        """Whether the live weights left the storage that the shards show (``.to()``, ``assign=True``, offloading)."""
        return self._watch.differs()

    def follow_buffers(self) -> bool:
        """Show the buffers that are registered now, and whether any is another tensor: modules may replace theirs."""
        replaced = False
        for name, (registry, own_name) in self._buffer_sites.items():
            shard, buffer = self.buffers[name], registry.get(own_name)
            if buffer is shard.owner:
                continue
            if buffer is None or buffer.shape != shard.owner.shape:
                now = None if buffer is None else tuple(buffer.shape)
                raise ValueError(f"buffer {name!r} had the shape {tuple(shard.owner.shape)} and now has {now}")
            shard.owner, shard.local = buffer, local_tensor(buffer)
            replaced = True
        return replaced


class _Watch:
    """Notices, in a few C-level passes over the registries, that a module or parameter is not what or where it was."""

    def __init__(self, model: nn.Module, sites: list[Site]) -> None:
        modules = list(model.modules())
        children = [(module._modules, name) for module in modules for name in module._modules]
        self._registries = [registry for registry, _ in children + sites]
        self._names = [name for _, name in children + sites]
        self._entries = list(map(dict.get, self._registries, self._names))
        self._grown = [registry for module in modules for registry in (module._modules, module._parameters)]
        self._lengths = list(map(len, self._grown))
        parameters = [registry[name] for registry, name in sites]
        self._plain = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        self._on_mesh = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
        self._units = fsdp1.units(model)
        self._addresses = self._current_addresses()

    def differs(self) -> bool:
        return (
            not all(map(is_, map(dict.get, self._registries, self._names), self._entries))
            or list(map(len, self._grown)) != self._lengths
            or self._current_addresses() != self._addresses
        )

    def _current_addresses(self) -> list[int]:
        flat = [fsdp1.local_shard(unit._handle.flat_param) for unit in self._units]
        return list(map(torch.Tensor.data_ptr, [*self._plain, *map(_local, self._on_mesh), *flat]))


# to_local() costs a microsecond per parameter and step; it is the fallback where the attribute is not there.
_local = attrgetter("_local_tensor") if "_local_tensor" in DTensor.__slots__ else local_tensor
