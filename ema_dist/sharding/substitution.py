"""Where the forward pass of a model finds its weights, and letting it find others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter, is_

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ema_dist.sharding.fsdp2 import Diversion
from ema_dist.sharding.layout import Layout
from ema_dist.sharding.registries import StandIns, Substitute
from ema_dist.sharding.shard import Shard
from ema_dist.sharding.watch import quick_local


class Stage:
    """Other tensors in the places of a model's weights, for the forward passes between `enter` and `leave`.

    The live weights are not touched, and nobody who holds them sees a difference.

    Args:
        layout: the live weights.
        locals_: for the first names of parameters and buffers this rank's tensors, as `Shard.empty` makes them.

    Memory: nothing but an object for each tensor.
    """

    def __init__(self, layout: Layout, locals_: Mapping[str, Tensor]) -> None:
        shards = {shard.name: shard for shard in layout.shards if shard.name in locals_}
        gathered = {name for name, shard in shards.items() if layout.units.room(shard.owner) is not None}
        shown = {name: _dressed(shard, locals_[name]) for name, shard in shards.items() if name not in gathered}
        self._diversion = Diversion(layout.units, {id(shards[name].owner): locals_[name] for name in gathered})
        sites = {
            name: {(id(it.registry), it.name): it for it in layout.sites[name]}.values()  # shared modules repeat theirs
            for name in locals_
        }
        self._stand_ins = StandIns(
            (Substitute(site, shards[name].owner, tensor) for name, tensor in shown.items() for site in sites[name]),
            (site.module for its in sites.values() for site in its),
        )
        self._wrappers = [it for it in layout.model.modules() if isinstance(it, DistributedDataParallel)]
        self._names = {id(shards[name].owner): name for name in locals_ if name in layout.parameters}
        # Modules may write to buffers, and put others in their places.
        self._shown = {name: tensor for name, tensor in shown.items() if name in layout.parameters}
        # What is shown shares the counter of its storage's writes, and is at hand anyway; but not what DTensor wraps.
        at_hand = {name: tensor for name, tensor in self._shown.items() if not isinstance(tensor, DTensor)}
        self._counting = {name: at_hand.get(name, locals_[name]) for name in locals_ if name in layout.parameters}
        self._on_mesh = any(isinstance(tensor, DTensor) for tensor in self._shown.values())
        self._owners = {name: shards[name].owner for name in self._shown}
        self._addresses = self._current_addresses()
        self._versions: list[int] = []
        self._gradients: list[Tensor | None] = []
        self._gradient_versions: list[int] = []
        self._syncs: list[bool] = []

    def enter(self) -> None:
        """Let the forward pass find the tensors."""
        self._versions = self._current_versions()
        self._gradients, self._gradient_versions = self._current_gradients()
        # Of DDP: whether its next forward pass broadcasts buffers, which one without gradients would leave out.
        self._syncs = [wrapper.require_forward_param_sync for wrapper in self._wrappers]
        self._diversion.enter()
        self._stand_ins.enter()

    @property
    def is_touched(self) -> bool:
        """Whether somebody asked what was shown for gradients, which the next block must not find there."""
        return any(map(_requires_grad, self._shown.values()))

    def leave(self) -> tuple[list[str], list[str]]:
        """Let it find the live weights.

        Returns: the names of parameters that were written to, moved or replaced meanwhile, and of those that were given
            gradients.
        """
        try:
            changed = self._stand_ins.leave()
        finally:
            moved = self._diversion.leave()
            for wrapper, sync in zip(self._wrappers, self._syncs, strict=True):
                wrapper.require_forward_param_sync = sync
        changed += moved
        names = {self._names[id(live)] for live in changed if id(live) in self._names}
        names |= _differing(self._counting, self._versions, self._current_versions())
        names |= _differing(self._shown, self._addresses, self._current_addresses())
        return sorted(names), self._given_gradients()

    def _given_gradients(self) -> list[str]:
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
        given = {it for it, version in new.items() if old.get(it) != version}
        return [name for name, it in zip(self._owners, now, strict=True) if id(it) in given]

    def _current_gradients(self) -> tuple[list[Tensor | None], list[int]]:
        """Of the parameters shown, and the versions of those that there are."""
        gradients = list(map(_gradient, self._owners.values()))
        return gradients, [it._version for it in gradients if it is not None]

    def _current_versions(self) -> list[int]:
        """They change when somebody writes to the tensors."""
        return list(map(_version, self._counting.values()))

    def _current_addresses(self) -> list[int]:
        """They change when somebody gives the parameters shown other storage."""
        return list(map(_address if self._on_mesh else torch.Tensor.data_ptr, self._shown.values()))


def obstacle(layout: Layout) -> str:
    """Why the forward pass of this model cannot be given other tensors; empty where it can."""
    if layout.has_flat_parameters:
        return "FSDP1 computes with views of its flat parameters"
    if layout.units.missing:
        return f"FSDP2 in torch {torch.__version__} lacks {layout.units.missing}"
    if layout.units.transformed:
        return "shards of FSDP2 transform themselves before they are gathered"
    shown = [shard.owner for shard in layout.parameters.values() if layout.units.room(shard.owner) is None]
    if types := sorted({type(it).__name__ for it in shown if type(it) not in (nn.Parameter, DTensor)}):
        return f"parameters are of types of their own, {types}"
    if any(isinstance(module, torch.jit.ScriptModule) for module in layout.model.modules()):
        return "TorchScript has compiled parameters into the model"
    return ""


def replays_graphs(modules: Iterable[nn.Module]) -> bool:
    """Whether one of them replays a CUDA graph, which reads the addresses at which it was captured."""
    if not torch.cuda.is_initialized():
        return False
    # torch.cuda.make_graphed_callables puts a function of its own module in the place of forward.
    replaced = [own["forward"] for own in map(vars, modules) if "forward" in own]
    return any(getattr(forward, "__module__", "") == "torch.cuda.graphs" for forward in replaced)


def _dressed(shard: Shard, local: Tensor) -> Tensor:
    """``local`` as modules find it, without gradients; with what else hangs on the live parameter."""
    tensor = shard.wrap(local)
    if not isinstance(shard.owner, nn.Parameter):
        return tensor
    parameter = nn.Parameter(tensor, requires_grad=False)
    vars(parameter).update(vars(shard.owner))
    return parameter


def _differing(names: Iterable[str], before: list[int], now: list[int]) -> set[str]:
    return set() if before == now else {name for name, then, it in zip(names, before, now, strict=True) if then != it}


_version = attrgetter("_version")  # autograd's counter has no public name
_gradient = attrgetter("grad")
_requires_grad = attrgetter("requires_grad")


def _address(tensor: Tensor) -> int:
    return (quick_local(tensor) if isinstance(tensor, DTensor) else tensor).data_ptr()
