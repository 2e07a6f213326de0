"""Where modules look their tensors up, and other tensors that stand there for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn


class Site(NamedTuple):
    """One entry of a module's registry of parameters or buffers."""

    module: nn.Module
    registry: dict[str, Any]
    name: str


class Substitute(NamedTuple):
    """A tensor, and the live one whose place it takes at one site."""

    site: Site
    live: Tensor
    tensor: Tensor

    def put(self, tensor: Tensor) -> None:
        """Register ``tensor`` at the site as the module itself would: RNNs keep a list of their weights beside."""
        setattr(self.site.module, self.site.name, tensor)

    @property
    def has_own_way(self) -> bool:
        """Whether the module does more than to register what is assigned to it."""
        return type(self.site.module).__setattr__ is not nn.Module.__setattr__


class StandIns:
    """Substitutes that the modules of a model find instead of their own tensors, between `enter` and `leave`.

    Meanwhile ``state_dict()`` of any of these modules returns the live tensors, and ``load_state_dict()`` is refused.
    The live tensors themselves are not touched: graphs that hold them run backward as if nothing had happened.

    Args:
        substitutes: at most one for each site; a tied tensor has one substitute at all of its sites.
        modules: all that are not to load weights meanwhile: those of the sites, and others.

    Memory: nothing.
    """

    def __init__(self, substitutes: Iterable[Substitute], modules: Iterable[nn.Module]) -> None:
        self._all = list(substitutes)
        self.live = {id(it.tensor): it.live for it in self._all}
        """The live tensors by the ids of their substitutes."""
        self._at: dict[int, list[Substitute]] = {}
        """The substitutes by the ids of their registries: copies of a module may share one."""
        for it in self._all:
            self._at.setdefault(id(it.site.registry), []).append(it)
        self._registered = [(it.site.registry, it.site.name, it.tensor, it.live) for it in self._all]
        self._assigned = [it for it in self._all if it.has_own_way]
        shown = dict.fromkeys(it.site.module for it in self._all)
        self._before_state: list[Any] = [module._state_dict_pre_hooks for module in shown]
        self._before_load: list[Any] = [module._load_state_dict_pre_hooks for module in dict.fromkeys(modules)]
        self._after_state: list[Any] = []
        """Of those modules whose state was asked for meanwhile."""

    def enter(self) -> None:
        """Put every substitute in its place."""
        _on_stage.append(self)
        for registry, name, tensor, _ in self._registered:
            registry[name] = tensor
        for it in self._assigned:
            it.put(it.tensor)
        # One dictionary entry each, where nn.Module's own functions would take microseconds for every module.
        for hooks in self._before_state:
            hooks[_KEY] = _show_live
            hooks.move_to_end(_KEY, last=False)  # other hooks see the live tensors too
        for hooks in self._before_load:
            hooks[_KEY] = _refuse_loading

    def leave(self) -> list[Tensor]:
        """Put the live tensors back; those in whose places something else than the substitute was found."""
        for hooks in chain(self._before_state, self._after_state, self._before_load):
            hooks.pop(_KEY, None)
        self._after_state.clear()
        replaced: list[Tensor] = []
        for registry, name, tensor, live in self._registered:
            if registry.get(name) is not tensor:
                replaced.append(live)
            registry[name] = live
        _on_stage.remove(self)
        with ExitStack() as stack:  # one that raises must not keep the others from their places
            for it in self._assigned:
                stack.callback(it.put, it.live)
        return replaced

    def show_live(self, module: nn.Module) -> None:
        """In one module, that is about to be asked for its state."""
        found = list(self._in(module))
        for it in found:
            it.site.registry[it.site.name] = it.live
        hooks: Any = module._state_dict_hooks
        if found and _KEY not in hooks:
            hooks[_KEY] = _show_substitutes
            self._after_state.append(hooks)

    def show_substitutes(self, module: nn.Module) -> None:
        """In one module, that was asked for its state."""
        for it in self._in(module):
            it.site.registry[it.site.name] = it.tensor

    def _in(self, module: nn.Module) -> Iterator[Substitute]:
        for registry in (module._parameters, module._buffers):
            yield from self._at.get(id(registry), ())


_on_stage: list[StandIns] = []
"""Those that have entered and not left."""

_KEY = "ema_dist"


def live_behind(tensor: Tensor) -> Tensor:
    """The live tensor whose place ``tensor`` takes at the moment; ``tensor`` itself where it is nobody's substitute."""
    for stand_ins in tuple(_on_stage):  # others may come and go in other threads
        tensor = stand_ins.live.get(id(tensor), tensor)
    return tensor


def _show_live(module: nn.Module, *_: object) -> None:
    for stand_ins in tuple(_on_stage):  # others may come and go in other threads
        stand_ins.show_live(module)


def _show_substitutes(module: nn.Module, *_: object) -> None:
    for stand_ins in tuple(_on_stage):  # others may come and go in other threads
        stand_ins.show_substitutes(module)


def _refuse_loading(*_: object) -> None:
    if _on_stage:  # the hook may have come along into a copy of the module
        raise RuntimeError("load_state_dict() inside serving(): the modules hold averages there; load after the block")
