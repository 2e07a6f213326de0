"""Detects whether the live weights were written to since a mark, without reading their values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet, finalize, ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ema_dist.averages.live_model import LiveModel
from ema_dist.sharding import Shard, untraced

BEGINNING = "beginning"
"""The mark set when the averages last matched the live weights: when they were made, loaded or reset."""
ATTACHING = "attach()"
"""The mark set when an optimizer was attached."""


class LiveWrites:
    """Notices writes to the averaged parameters of ``live``: by version counters, and by the steps of optimizers.

    Version counters alone do not suffice: fused optimizers do not increase them, and neither do the multi-tensor
    operations of sharded parameters. A write through ``.data`` outside of an optimizer is not noticed.
    """

    def __init__(self, live: LiveModel) -> None:
        self._live = live
        self._unwritten: dict[str, list[object]] = {}
        """The marks since which no write was noticed, with the parameters' versions at the mark."""
        self._is_paused = False
        self.averages_were_loaded = False
        """Whether the averages were loaded, so that live weights loaded after them do not make them outdated."""
        _instances.add(self)
        self_ref = ref(self)  # torch references the hooks globally, and so would keep this object alive

        def before_step(optimizer: Optimizer, *_: Any) -> None:  # noqa: ANN401  as torch calls it
            if (writes := self_ref()) is not None:
                writes.before_step(optimizer)

        @untraced  # otherwise torch.compile(optimizer.step) would trace it, and again after each mark
        def after_step(optimizer: Optimizer, *_: Any) -> None:  # noqa: ANN401  as torch calls it
            if (writes := self_ref()) is not None:
                writes.after_step(optimizer)

        finalize(self, register_optimizer_step_pre_hook(before_step).remove)
        finalize(self, register_optimizer_step_post_hook(after_step).remove)
        for module in _wrappers_and_model(live.layout.model):
            finalize(self, module.register_load_state_dict_post_hook(_after_load).remove)

    def mark(self, name: str) -> None:
        """Set a mark, or move an existing one to the present."""
        self._unwritten[name] = self._versions()

    def was_written_since(self, name: str) -> bool:
        """Whether a write was noticed since a mark; False for one that was never set."""
        self._drop_written()
        return name not in self._unwritten

    def pause(self) -> None:
        """Ignore writes until `resume`, because `ema_dist` makes them: they do not make the averages outdated."""
        self._drop_written()
        self._is_paused = True

    def resume(self) -> None:
        """Notice writes again."""
        self._is_paused = False
        self._mark_again()

    def shares_modules_with(self, model: nn.Module) -> bool:
        """Whether a write to ``model`` may change these parameters."""
        return self._live.layout.shares_modules_with(model)

    def note_load(self) -> None:
        """Record a load into the model: it is no optimizer step, and the weights match averages loaded before it."""
        if self._is_paused:
            return
        self._live.refresh(only_if_moved=True)  # ``assign=True`` replaces parameters; the next call reports problems
        for name in self._unwritten:
            if name != BEGINNING or self.averages_were_loaded:
                self.mark(name)

    def before_step(self, optimizer: Optimizer) -> None:
        """Called by torch before each step of any optimizer."""
        if self._unwritten and _has_zero_learning_rates(optimizer):
            self._drop_written()

    def after_step(self, optimizer: Optimizer) -> None:
        """Called by torch after each step of any optimizer."""
        if not self._unwritten:
            return
        if _has_zero_learning_rates(optimizer):
            self._mark_again()
        elif not _is_known_to_skip(optimizer):
            owner_ids = {id(owner) for name in self._live.selected for owner in self._shard(name).owners.values()}
            if any(id(parameter) in owner_ids for group in optimizer.param_groups for parameter in group["params"]):
                self._unwritten.clear()

    def _drop_written(self) -> None:
        if self._unwritten and not self._is_paused:
            versions = self._versions()
            self._unwritten = {name: then for name, then in self._unwritten.items() if then == versions}

    def _mark_again(self) -> None:
        if not self._is_paused:
            for name in self._unwritten:
                self.mark(name)

    def _versions(self) -> list[object]:
        return [self._shard(name).owner_versions for name in self._live.selected]

    def _shard(self, name: str) -> Shard:
        return self._live.layout.parameters[name]


_instances: WeakSet[LiveWrites] = WeakSet()


def all_writes_to(model: nn.Module) -> list[LiveWrites]:
    """The `LiveWrites` of every ShardedEMA that shares modules with ``model``."""
    return [writes for writes in _instances if writes.shares_modules_with(model)]


def note_load(model: nn.Module) -> None:
    """Record that weights were loaded into ``model``; see `LiveWrites.note_load`."""
    for writes in all_writes_to(model):
        writes.note_load()


def _after_load(module: nn.Module, _incompatible_keys: object) -> None:
    # A module-level function, so that models that have it as a hook can be pickled and copied.
    note_load(module)


def _wrappers_and_model(model: nn.Module) -> Iterator[nn.Module]:
    """The model and the modules that it wraps: users may call ``load_state_dict`` on any of them."""
    yield model
    while not [*model.parameters(recurse=False)] and len(children := [*model.children()]) == 1:
        (model,) = children
        yield model


def _has_zero_learning_rates(optimizer: Optimizer) -> bool:
    """Whether a step changes no weight: `torch.distributed.checkpoint` takes one to initialize an optimizer."""
    return all(_is_known(rate := group.get("lr")) and rate == 0 for group in optimizer.param_groups)


def _is_known_to_skip(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler made a fused optimizer skip this step, if the host can see that without waiting."""
    found_inf = getattr(optimizer, "found_inf", None)
    return _is_known(found_inf) and bool(found_inf != 0)


def _is_known(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.device.type == "cpu")
