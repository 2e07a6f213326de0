"""The registries in which modules look up their tensors, and the temporary substitution of other tensors there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn


class RegistryEntry(NamedTuple):
    """One entry in a module's registry of parameters or buffers (``_parameters`` or ``_buffers``)."""

    module: nn.Module
    registry: dict[str, Any]
    name: str


class Substitute(NamedTuple):
    """A tensor that replaces the live one in one registry entry."""

    entry: RegistryEntry
    live: Tensor
    tensor: Tensor

    def assign(self, tensor: Tensor) -> None:
        """Register ``tensor`` by ``setattr``, which does more in some modules: RNNs also update a list of weights."""
        setattr(self.entry.module, self.entry.name, tensor)

    @property
    def has_custom_setattr(self) -> bool:
        """Whether the module overrides ``__setattr__``, and so may do more than register a tensor."""
        return type(self.entry.module).__setattr__ is not nn.Module.__setattr__


class RegistrySubstitution:
    """Between `enter` and `leave`, modules find substitutes in their registries instead of the live tensors.

    Meanwhile ``state_dict()`` of these modules returns the live tensors, and ``load_state_dict()`` raises a
    RuntimeError. The live tensors do not change, and graphs that hold them can run backward.

    Args:
        substitutes: at most one for each registry entry; the entries of a tied tensor have the same substitute.
        modules: the modules, of the entries and others, whose ``load_state_dict()`` raises meanwhile.

    Memory: none.
    """

    def __init__(self, substitutes: Iterable[Substitute], modules: Iterable[nn.Module]) -> None:
        self._substitutes = list(substitutes)
        self.live: dict[int, Tensor] = {id(substitute.tensor): substitute.live for substitute in self._substitutes}
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
        """The hooks of modules whose ``state_dict()`` was called meanwhile."""
        self._is_inside = False
        """Whether `enter` has completed, and `leave` has not begun."""

    def enter(self) -> None:
        """Put every substitute into its registry entry."""
        _active.append(self)  # before a module holds a substitute, which `resolve_live` must know
        for registry, name, tensor, _ in self._set_in_registry:
            registry[name] = tensor
        for substitute in self._set_by_module:
            substitute.assign(substitute.tensor)
        # The private dictionaries of hooks are faster than the public functions, which take microseconds each.
        for hooks in self._state_pre_hooks:
            hooks[_HOOK_KEY] = _show_live
            hooks.move_to_end(_HOOK_KEY, last=False)  # first, so that the user's hooks see the live tensors too
        for hooks in self._load_pre_hooks:
            hooks[_HOOK_KEY] = _refuse_loading
        self._is_inside = True

    def leave(self) -> list[Tensor]:
        """Put the live tensors back; can be called again if an exception interrupted it or `enter`.

        Returns: the live tensors whose substitutes were replaced since `enter`.
        """
        was_inside, self._is_inside = self._is_inside, False
        for hooks in chain(self._state_pre_hooks, self._state_post_hooks, self._load_pre_hooks):
            hooks.pop(_HOOK_KEY, None)
        self._state_post_hooks.clear()
        replaced: list[Tensor] = []
        for registry, name, tensor, live in self._set_in_registry:
            current = registry.get(name)
            if current is not tensor and (was_inside or current is not live):
                replaced.append(live)
            registry[name] = live
        if self in _active:
            _active.remove(self)  # after the last substitute is out of its registry
        with ExitStack() as stack:  # if one assignment raises, the others still run
            for substitute in self._set_by_module:
                stack.callback(substitute.assign, substitute.live)
        return replaced

    def show_live(self, module: nn.Module) -> None:
        """Register the live tensors of one module, before its ``state_dict()``."""
        substitutes = list(self._substitutes_of(module))
        for substitute in substitutes:
            substitute.entry.registry[substitute.entry.name] = substitute.live
        hooks: Any = module._state_dict_hooks
        if substitutes and _HOOK_KEY not in hooks:
            hooks[_HOOK_KEY] = _show_substitutes
            self._state_post_hooks.append(hooks)

    def show_substitutes(self, module: nn.Module) -> None:
        """Register the substitutes of one module again, after its ``state_dict()``."""
        for substitute in self._substitutes_of(module):
            substitute.entry.registry[substitute.entry.name] = substitute.tensor

    def _substitutes_of(self, module: nn.Module) -> Iterator[Substitute]:
        for registry in (module._parameters, module._buffers):
            yield from self._by_registry.get(id(registry), ())


_active: list[RegistrySubstitution] = []
"""The substitutions between `enter` and `leave`."""

_HOOK_KEY = "ema_dist"


def resolve_live(tensor: Tensor) -> Tensor:
    """The live tensor that ``tensor`` currently replaces; ``tensor`` itself if it is not a substitute."""
    for substitution in tuple(_active):  # a copy: other threads may enter and leave
        tensor = substitution.live.get(id(tensor), tensor)
    return tensor


def _show_live(module: nn.Module, *_: object) -> None:
    for substitution in tuple(_active):  # a copy: other threads may enter and leave
        substitution.show_live(module)


def _show_substitutes(module: nn.Module, *_: object) -> None:
    for substitution in tuple(_active):  # a copy: other threads may enter and leave
        substitution.show_substitutes(module)


def _refuse_loading(*_: object) -> None:
    if _active:  # a deepcopy of a module has the hook, too, and keeps it after the block
        raise RuntimeError("load_state_dict() inside serving(): the modules hold averages there; load after the block")


def replace_inference_buffers(model: nn.Module) -> None:
    """Replace persistent buffers that were made in ``torch.inference_mode()`` with copies that can be written to.

    A module that assigns its buffers (``self.total = self.total + 1``) makes such a buffer in each evaluation.
    """
    replaced: dict[int, tuple[Tensor, Tensor]] = {}  # keeps the old buffers, because ids of freed objects are reused
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or not buffer.is_inference():
                continue
            if id(buffer) not in replaced:
                replaced[id(buffer)] = buffer, buffer.clone()
            module._buffers[name] = replaced[id(buffer)][1]
