"""Which models of this process have averages in them at the moment, or read them."""

from __future__ import annotations

from collections.abc import MutableSet
from threading import Lock
from typing import Generic, Protocol, TypeVar
from weakref import WeakSet

from torch import nn

from ema_dist.sharding import Layout


class HasLayout(Protocol):
    """Something that is begun and ended, in the model that ``layout`` shows."""

    layout: Layout


S = TypeVar("S", bound=HasLayout)


class ActiveRegistry(Generic[S]):
    """Those that have begun and not ended; other threads may begin and end theirs meanwhile."""

    def __init__(self) -> None:
        self._all: MutableSet[S] = WeakSet()
        self._lock = Lock()

    def add(self, entry: S) -> None:
        """From now on it is one of them."""
        with self._lock:
            self._all.add(entry)

    def remove(self, entry: S) -> None:
        """It is one of them no more."""
        with self._lock:
            self._all.discard(entry)

    def overlapping(self, model: nn.Module) -> list[S]:
        """Those in ``model``, or in a part of it, or in something that it is a part of."""
        with self._lock:
            entries = list(self._all)
        return [entry for entry in entries if entry.layout.shares_modules_with(model)]
