"""Makes the forward pass of a model compute with other tensors instead of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter, is_

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ema_dist.sharding.fsdp2 import GatherSubstitution
from ema_dist.sharding.layout import Layout
from ema_dist.sharding.mesh_shard import dtensor_local
from ema_dist.sharding.registries import RegistrySubstitution, Substitute, resolve_live
from ema_dist.sharding.shard import Shard


class Substitution:
    """Between `enter` and `leave`, forward passes compute with other tensors instead of the model's weights.

    The live weights do not change.

    Args:
        layout: the live weights.
        local_tensors: this rank's tensors to compute with, by the first names of parameters and buffers; each is like
            the result of `Shard.empty_local`.

    Memory: no storage, only an object for each tensor.
    """

    def __init__(self, layout: Layout, local_tensors: Mapping[str, Tensor]) -> None:
        shards = {shard.name: shard for shard in layout.shards if shard.name in local_tensors}
        gathered_names = {
            name for name, shard in shards.items() if layout.fsdp2_units.padded_numel(shard.owner) is not None
        }
        # Every object that modules hold gets a substitute of its own, so that each gets its own object back.
        substitutes = {
            id(owner): _make_substitute(shard, owner, local_tensors[name])
            for name, shard in shards.items()
            if name not in gathered_names
            for owner in shard.owners.values()
        }
        self._gather_substitution = GatherSubstitution(
            layout.fsdp2_units, {id(shards[name].owner): local_tensors[name] for name in gathered_names}
        )
        registry_entries = {
            # A shared module repeats its entries, and each needs one substitute.
            name: {(id(entry.registry), entry.name): entry for entry in layout.registry_entries[name]}.values()
            for name in local_tensors
        }
        self._registry_substitution = RegistrySubstitution(
            (
                Substitute(entry, live, substitutes[id(live)])
                for name in local_tensors
                if name not in gathered_names
                for entry in registry_entries[name]
                for live in (resolve_live(entry.registry[entry.name]),)
            ),
            (entry.module for entries in registry_entries.values() for entry in entries),
        )
        self._ddp_modules = [module for module in layout.model.modules() if isinstance(module, DistributedDataParallel)]
        self._names = {
            id(owner): name
            for name in local_tensors
            if name in layout.parameters
            for owner in shards[name].owners.values()
        }
        # Only parameters are checked on leaving: modules may write to buffers and replace them.
        self._owners = {
            own_name: owner
            for name in local_tensors
            if name in layout.parameters and name not in gathered_names
            for own_name, owner in shards[name].owners.items()
        }
        self._substitutes = {own_name: substitutes[id(owner)] for own_name, owner in self._owners.items()}
        # Writes to these tensors are detected by version counters. A plain substitute shares the counter of its local
        # tensor; a DTensor has its own, so that its local tensor is checked instead.
        self._versioned = {
            name: tensor for name, tensor in self._substitutes.items() if not isinstance(tensor, DTensor)
        }
        self._versioned |= {
            name: local_tensors[name]
            for name in local_tensors
            if name in layout.parameters and shards[name].owner_name not in self._versioned
        }
        self._has_dtensors = any(isinstance(tensor, DTensor) for tensor in self._substitutes.values())
        self._addresses = self._current_addresses()
        self._versions: list[int] = []
        self._gradients: list[Tensor | None] = []
        self._gradient_versions: list[int] = []
        self._forward_syncs: list[bool] = []
        self._is_inside = False
        """Whether `enter` has completed and `leave` has not."""

    def enter(self) -> None:
        """Put the tensors where forward passes read weights."""
        self._versions = self._current_versions()
        self._gradients, self._gradient_versions = self._current_gradients()
        # DDP broadcasts buffers in a forward pass if this flag is set, and a pass without gradients changes the flag.
        self._forward_syncs = [ddp.require_forward_param_sync for ddp in self._ddp_modules]
        self._gather_substitution.enter()
        self._registry_substitution.enter()
        self._is_inside = True

    @property
    def has_requires_grad(self) -> bool:
        """Whether a substitute requires gradients now, so that the next block must not reuse it."""
        return any(map(_requires_grad, self._substitutes.values()))

    def leave(self) -> tuple[list[str], list[str]]:
        """Put the live weights back; can be called again if an exception interrupted it or `enter`.

        Returns: the names of parameters that were written to, moved or replaced since `enter`, and the names of
            parameters that got gradients.
        """
        try:
            replaced = self._registry_substitution.leave()
        finally:
            moved = self._gather_substitution.leave()
            for ddp, sync in zip(self._ddp_modules, self._forward_syncs, strict=False):  # empty before `enter`
                ddp.require_forward_param_sync = sync
        names = {self._names[id(live)] for live in (*replaced, *moved) if id(live) in self._names}
        if not self._is_inside:
            return sorted(names), []
        names |= _changed_names(self._versioned, self._versions, self._current_versions())
        names |= _changed_names(self._substitutes, self._addresses, self._current_addresses())
        trained = self._changed_gradients()
        self._is_inside = False
        self._gradients.clear()
        self._gradient_versions.clear()
        return sorted(names), trained

    def _changed_gradients(self) -> list[str]:
        """The names of parameters whose gradients were added, replaced or written to since `enter`."""
        old_gradients, old_versions = self._gradients, self._gradient_versions
        new_gradients, new_versions = self._current_gradients()
        if old_versions == new_versions and all(map(is_, old_gradients, new_gradients)):
            return []
        old, new = _versions_by_id(old_gradients, old_versions), _versions_by_id(new_gradients, new_versions)
        changed_ids = {key for key, version in new.items() if old.get(key) != version}
        return [name for name, gradient in zip(self._owners, new_gradients, strict=True) if id(gradient) in changed_ids]

    def _current_gradients(self) -> tuple[list[Tensor | None], list[int]]:
        """The gradients of the substituted parameters, and the versions of those that are not None."""
        gradients = list(map(_gradient, self._owners.values()))
        return gradients, [gradient._version for gradient in gradients if gradient is not None]

    def _current_versions(self) -> list[int]:
        """The versions of the tensors, which change when they are written to."""
        return list(map(_version, self._versioned.values()))

    def _current_addresses(self) -> list[int]:
        """The addresses of the substitutes, which change when they get other storage."""
        return list(map(_address if self._has_dtensors else torch.Tensor.data_ptr, self._substitutes.values()))


def unsupported_reason(layout: Layout, names: Iterable[str]) -> str:
    """Why `Substitution` cannot replace the parameters ``names`` of this model; empty if it can."""
    if layout.has_flat_parameters:
        return "FSDP1 computes with views of its flat parameters"
    if layout.fsdp2_units.missing_attributes:
        return f"FSDP2 in torch {torch.__version__} lacks {layout.fsdp2_units.missing_attributes}"
    if layout.fsdp2_units.has_gather_transforms:
        return "shards of FSDP2 transform themselves before they are gathered"
    owners = [layout.parameters[name].owner for name in names]
    not_gathered = [owner for owner in owners if layout.fsdp2_units.padded_numel(owner) is None]
    if types := sorted({type(owner).__name__ for owner in not_gathered if type(owner) not in (nn.Parameter, DTensor)}):
        return f"parameters have custom types, {types}"
    if any(isinstance(module, torch.jit.ScriptModule) for module in layout.model.modules()):
        return "TorchScript has compiled parameters into the model"
    return ""


def replays_cuda_graph(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules replays a CUDA graph, which reads the addresses at which it was captured."""
    if not torch.cuda.is_initialized():
        return False
    # torch.cuda.make_graphed_callables replaces forward with a function of its own module.
    replaced = [own["forward"] for own in map(vars, modules) if "forward" in own]
    return any(getattr(forward, "__module__", "") == "torch.cuda.graphs" for forward in replaced)


def _make_substitute(shard: Shard, owner: Tensor, local: Tensor) -> Tensor:
    """``local`` wrapped for a registry, without gradients but with the other attributes of the live parameter."""
    tensor = shard.wrap_for_forward(local)
    if not isinstance(owner, nn.Parameter):
        # Two owners must not have one substitute: its live tensor could be either of them.
        return tensor if not shard.other_owners else tensor.view_as(tensor)
    parameter = nn.Parameter(tensor, requires_grad=False)
    vars(parameter).update(vars(owner))
    return parameter


def _versions_by_id(gradients: list[Tensor | None], versions: list[int]) -> dict[int, int]:
    return dict(zip((id(gradient) for gradient in gradients if gradient is not None), versions, strict=True))


def _changed_names(names: Iterable[str], before: list[int], now: list[int]) -> set[str]:
    return set() if before == now else {name for name, old, new in zip(names, before, now, strict=True) if old != new}


_version = attrgetter("_version")  # autograd's counter has no public name
_gradient = attrgetter("grad")
_requires_grad = attrgetter("requires_grad")


def _address(tensor: Tensor) -> int:
    return (dtensor_local(tensor) if isinstance(tensor, DTensor) else tensor).data_ptr()
