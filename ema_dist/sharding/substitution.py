"""Where the forward pass of a model finds its weights, and letting it find others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter, is_

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ema_dist.sharding.fsdp2 import GatherSubstitution
from ema_dist.sharding.layout import Layout
from ema_dist.sharding.mesh_shard import quick_local
from ema_dist.sharding.registries import RegistrySubstitution, Substitute
from ema_dist.sharding.shard import Shard


class Substitution:
    """Other tensors in the places of a model's weights, for the forward passes between `enter` and `leave`.

    The live weights are not touched, and nobody who holds them sees a difference.

    Args:
        layout: the live weights.
        locals_: for the first names of parameters and buffers this rank's tensors, as `Shard.empty_local` makes them.

    Memory: nothing but an object for each tensor.
    """

    def __init__(self, layout: Layout, local_tensors: Mapping[str, Tensor]) -> None:
        shards = {shard.name: shard for shard in layout.shards if shard.name in local_tensors}
        gathered_names = {
            name for name, shard in shards.items() if layout.fsdp2_units.padded_numel(shard.owner) is not None
        }
        substitutes = {
            name: _make_substitute(shard, local_tensors[name])
            for name, shard in shards.items()
            if name not in gathered_names
        }
        self._gather_substitution = GatherSubstitution(
            layout.fsdp2_units, {id(shards[name].owner): local_tensors[name] for name in gathered_names}
        )
        registry_entries = {
            name: {
                (id(it.registry), it.name): it for it in layout.registry_entries[name]
            }.values()  # shared modules repeat theirs
            for name in local_tensors
        }
        self._registry_substitution = RegistrySubstitution(
            (
                Substitute(entry, shards[name].owner, tensor)
                for name, tensor in substitutes.items()
                for entry in registry_entries[name]
            ),
            (entry.module for its in registry_entries.values() for entry in its),
        )
        self._ddp_modules = [it for it in layout.model.modules() if isinstance(it, DistributedDataParallel)]
        self._names = {id(shards[name].owner): name for name in local_tensors if name in layout.parameters}
        # Modules may write to buffers, and put others in their places.
        self._substitutes = {name: tensor for name, tensor in substitutes.items() if name in layout.parameters}
        # What is shown shares the counter of its storage's writes, and is at hand anyway; but not what DTensor wraps.
        plain_substitutes = {
            name: tensor for name, tensor in self._substitutes.items() if not isinstance(tensor, DTensor)
        }
        self._versioned = {
            name: plain_substitutes.get(name, local_tensors[name])
            for name in local_tensors
            if name in layout.parameters
        }
        self._has_dtensors = any(isinstance(tensor, DTensor) for tensor in self._substitutes.values())
        self._owners = {name: shards[name].owner for name in self._substitutes}
        self._addresses = self._current_addresses()
        self._versions: list[int] = []
        self._gradients: list[Tensor | None] = []
        self._gradient_versions: list[int] = []
        self._forward_syncs: list[bool] = []

    def enter(self) -> None:
        """Let the forward pass find the tensors."""
        self._versions = self._current_versions()
        self._gradients, self._gradient_versions = self._current_gradients()
        # Of DDP: whether its next forward pass broadcasts buffers, which one without gradients would leave out.
        self._forward_syncs = [ddp.require_forward_param_sync for ddp in self._ddp_modules]
        self._gather_substitution.enter()
        self._registry_substitution.enter()

    @property
    def has_requires_grad(self) -> bool:
        """Whether somebody asked what was shown for gradients, which the next block must not find there."""
        return any(map(_requires_grad, self._substitutes.values()))

    def leave(self) -> tuple[list[str], list[str]]:
        """Let it find the live weights.

        Returns: the names of parameters that were written to, moved or replaced meanwhile, and of those that were given
            gradients.
        """
        try:
            changed = self._registry_substitution.leave()
        finally:
            moved = self._gather_substitution.leave()
            for ddp, sync in zip(self._ddp_modules, self._forward_syncs, strict=True):
                ddp.require_forward_param_sync = sync
        changed += moved
        names = {self._names[id(live)] for live in changed if id(live) in self._names}
        names |= _changed_names(self._versioned, self._versions, self._current_versions())
        names |= _changed_names(self._substitutes, self._addresses, self._current_addresses())
        return sorted(names), self._changed_gradients()

    def _changed_gradients(self) -> list[str]:
        """The names of parameters whose gradients are others than on entering, or were written to."""
        before, versions = self._gradients, self._gradient_versions
        now, versions_now = self._current_gradients()
        self._gradients = []
        if versions == versions_now and all(map(is_, before, now)):
            return []
        old, new = (
            dict(zip((id(it) for it in its if it is not None), counts, strict=True))
            for its, counts in ((before, versions), (now, versions_now))
        )
        changed_ids = {it for it, version in new.items() if old.get(it) != version}
        return [name for name, it in zip(self._owners, now, strict=True) if id(it) in changed_ids]

    def _current_gradients(self) -> tuple[list[Tensor | None], list[int]]:
        """Of the parameters shown, and the versions of those that there are."""
        gradients = list(map(_gradient, self._owners.values()))
        return gradients, [gradient._version for gradient in gradients if gradient is not None]

    def _current_versions(self) -> list[int]:
        """They change when somebody writes to the tensors."""
        return list(map(_version, self._versioned.values()))

    def _current_addresses(self) -> list[int]:
        """They change when somebody gives the parameters shown other storage."""
        return list(map(_address if self._has_dtensors else torch.Tensor.data_ptr, self._substitutes.values()))


def unsupported_reason(layout: Layout) -> str:
    """Why the forward pass of this model cannot be given other tensors; empty where it can."""
    if layout.has_flat_parameters:
        return "FSDP1 computes with views of its flat parameters"
    if layout.fsdp2_units.missing_attributes:
        return f"FSDP2 in torch {torch.__version__} lacks {layout.fsdp2_units.missing_attributes}"
    if layout.fsdp2_units.has_gather_transforms:
        return "shards of FSDP2 transform themselves before they are gathered"
    substitutes = [
        shard.owner for shard in layout.parameters.values() if layout.fsdp2_units.padded_numel(shard.owner) is None
    ]
    if types := sorted({type(it).__name__ for it in substitutes if type(it) not in (nn.Parameter, DTensor)}):
        return f"parameters are of types of their own, {types}"
    if any(isinstance(module, torch.jit.ScriptModule) for module in layout.model.modules()):
        return "TorchScript has compiled parameters into the model"
    return ""


def replays_cuda_graph(modules: Iterable[nn.Module]) -> bool:
    """Whether one of them replays a CUDA graph, which reads the addresses at which it was captured."""
    if not torch.cuda.is_initialized():
        return False
    # torch.cuda.make_graphed_callables puts a function of its own module in the place of forward.
    replaced = [own["forward"] for own in map(vars, modules) if "forward" in own]
    return any(getattr(forward, "__module__", "") == "torch.cuda.graphs" for forward in replaced)


def _make_substitute(shard: Shard, local: Tensor) -> Tensor:
    """``local`` as modules find it, without gradients; with what else hangs on the live parameter."""
    tensor = shard.wrap(local)
    if not isinstance(shard.owner, nn.Parameter):
        return tensor
    parameter = nn.Parameter(tensor, requires_grad=False)
    vars(parameter).update(vars(shard.owner))
    return parameter


def _changed_names(names: Iterable[str], before: list[int], now: list[int]) -> set[str]:
    return set() if before == now else {name for name, old, new in zip(names, before, now, strict=True) if old != new}


_version = attrgetter("_version")  # autograd's counter has no public name
_gradient = attrgetter("grad")
_requires_grad = attrgetter("requires_grad")


def _address(tensor: Tensor) -> int:
    return (quick_local(tensor) if isinstance(tensor, DTensor) else tensor).data_ptr()
