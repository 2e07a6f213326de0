"""Where modules look their tensors up, and other tensors that stand there for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn


class RegistryEntry(NamedTuple):
    """One entry of a module's registry of parameters or buffers."""

    module: nn.Module
    registry: dict[str, Any]
    name: str


class Substitute(NamedTuple):
    """A tensor, and the live one whose place it takes at one site."""

    entry: RegistryEntry
    live: Tensor
    tensor: Tensor

    def assign(self, tensor: Tensor) -> None:
        """Register ``tensor`` at the site as the module itself would: RNNs keep a list of their weights beside."""
        setattr(self.entry.module, self.entry.name, tensor)

    @property
    def has_custom_setattr(self) -> bool:
        """Whether the module does more than to register what is assigned to it."""
        return type(self.entry.module).__setattr__ is not nn.Module.__setattr__


class RegistrySubstitution:
    """Substitutes that the modules of a model find instead of their own tensors, between `enter` and `leave`.

    Meanwhile ``state_dict()`` of any of these modules returns the live tensors, and ``load_state_dict()`` is refused.
    The live tensors themselves are not touched: graphs that hold them run backward as if nothing had happened.

    Args:
        substitutes: at most one for each site; a tied tensor has one substitute at all of its sites.
        modules: all that are not to load weights meanwhile: those of the sites, and others.

    Memory: nothing.
    """

    def __init__(self, substitutes: Iterable[Substitute], modules: Iterable[nn.Module]) -> None:
        self._substitutes = list(substitutes)
        self.live = {id(substitute.tensor): substitute.live for substitute in self._substitutes}
        """The live tensors by the ids of their substitutes."""
        self._by_registry: dict[int, list[Substitute]] = {}
        """The substitutes by the ids of their registries: copies of a module may share one."""
        for substitute in self._substitutes:
            self._by_registry.setdefault(id(substitute.entry.registry), []).append(substitute)
        self._set_in_registry = [
            (substitute.entry.registry, substitute.entry.name, substitute.tensor, substitute.live)
            for substitute in self._substitutes
        ]
        self._set_by_module = [substitute for substitute in self._substitutes if substitute.has_custom_setattr]
        substituted_modules = dict.fromkeys(substitute.entry.module for substitute in self._substitutes)
        self._state_pre_hooks: list[Any] = [module._state_dict_pre_hooks for module in substituted_modules]
        self._load_pre_hooks: list[Any] = [module._load_state_dict_pre_hooks for module in dict.fromkeys(modules)]
        self._state_post_hooks: list[Any] = []
        """Of those modules whose state was asked for meanwhile."""

    def enter(self) -> None:
        """Put every substitute in its place."""
        _active.append(self)
        for registry, name, tensor, _ in self._set_in_registry:
            registry[name] = tensor
        for substitute in self._set_by_module:
            substitute.assign(substitute.tensor)
        # One dictionary entry each, where nn.Module's own functions would take microseconds for every module.
        for hooks in self._state_pre_hooks:
            hooks[_HOOK_KEY] = _show_live
            hooks.move_to_end(_HOOK_KEY, last=False)  # other hooks see the live tensors too
        for hooks in self._load_pre_hooks:
            hooks[_HOOK_KEY] = _refuse_loading

    def leave(self) -> list[Tensor]:
        """Put the live tensors back; those in whose places something else than the substitute was found."""
        for hooks in chain(self._state_pre_hooks, self._state_post_hooks, self._load_pre_hooks):
            hooks.pop(_HOOK_KEY, None)
        self._state_post_hooks.clear()
        replaced: list[Tensor] = []
        for registry, name, tensor, live in self._set_in_registry:
            if registry.get(name) is not tensor:
                replaced.append(live)
            registry[name] = live
        _active.remove(self)
        with ExitStack() as stack:  # one that raises must not keep the others from their places
            for substitute in self._set_by_module:
                stack.callback(substitute.assign, substitute.live)
        return replaced

    def show_live(self, module: nn.Module) -> None:
        """In one module, that is about to be asked for its state."""
        substitutes = list(self._substitutes_of(module))
        for substitute in substitutes:
            substitute.entry.registry[substitute.entry.name] = substitute.live
        hooks: Any = module._state_dict_hooks
        if substitutes and _HOOK_KEY not in hooks:
            hooks[_HOOK_KEY] = _show_substitutes
            self._state_post_hooks.append(hooks)

    def show_substitutes(self, module: nn.Module) -> None:
        """In one module, that was asked for its state."""
        for substitute in self._substitutes_of(module):
            substitute.entry.registry[substitute.entry.name] = substitute.tensor

    def _substitutes_of(self, module: nn.Module) -> Iterator[Substitute]:
        for registry in (module._parameters, module._buffers):
            yield from self._by_registry.get(id(registry), ())


_active: list[RegistrySubstitution] = []
"""Those that have entered and not left."""

_HOOK_KEY = "ema_dist"


def resolve_live(tensor: Tensor) -> Tensor:
    """The live tensor whose place ``tensor`` takes at the moment; ``tensor`` itself where it is nobody's substitute."""
    for substitution in tuple(_active):  # others may come and go in other threads
        tensor = substitution.live.get(id(tensor), tensor)
    return tensor


def _show_live(module: nn.Module, *_: object) -> None:
    for substitution in tuple(_active):  # others may come and go in other threads
        substitution.show_live(module)


def _show_substitutes(module: nn.Module, *_: object) -> None:
    for substitution in tuple(_active):  # others may come and go in other threads
        substitution.show_substitutes(module)


def _refuse_loading(*_: object) -> None:
    if _active:  # the hook may have come along into a copy of the module
        raise RuntimeError("load_state_dict() inside serving(): the modules hold averages there; load after the block")
