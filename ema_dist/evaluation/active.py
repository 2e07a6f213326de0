"""The registry of swaps and servings that are active in this process."""

from __future__ import annotations

from collections.abc import MutableSet
from threading import Lock
from typing import Generic, Protocol, TypeVar
from weakref import WeakSet

from torch import nn

from ema_dist.sharding import Layout


class HasLayout(Protocol):
    """A swap or a serving of the model that ``layout`` describes."""

    layout: Layout


S = TypeVar("S", bound=HasLayout)


class ActiveRegistry(Generic[S]):
    """Active swaps or servings, of any number of models; safe to use from several threads."""

    def __init__(self) -> None:
        # Weak, so that an average whose swap was never left can still be freed.
        self._entries: MutableSet[S] = WeakSet()
        self._lock = Lock()

    def add(self, entry: S) -> None:
        """Record the start of ``entry``."""
        with self._lock:
            self._entries.add(entry)

    def remove(self, entry: S) -> None:
        """Record the end of ``entry``."""
        with self._lock:
            self._entries.discard(entry)

    def overlapping(self, model: nn.Module) -> list[S]:
        """The entries whose model shares modules with ``model``: itself, a submodule, or a module around it."""
        with self._lock:
            entries = list(self._entries)
        return [entry for entry in entries if entry.layout.shares_modules_with(model)]
