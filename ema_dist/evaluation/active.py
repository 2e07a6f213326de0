"""Which models of this process have averages in them at the moment, or read them."""

from __future__ import annotations

from collections.abc import MutableSet
from threading import Lock
from typing import Generic, Protocol, TypeVar
from weakref import WeakSet

from torch import nn

from ema_dist.sharding import Layout


class Stay(Protocol):
    """Something that is begun and ended, in the model that ``layout`` shows."""

    layout: Layout


S = TypeVar("S", bound=Stay)


class Stays(Generic[S]):
    """Those that have begun and not ended; other threads may begin and end theirs meanwhile."""

    def __init__(self) -> None:
        self._all: MutableSet[S] = WeakSet()
        self._lock = Lock()

    def begin(self, stay: S) -> None:
        """From now on it is one of them."""
        with self._lock:
            self._all.add(stay)

    def end(self, stay: S) -> None:
        """It is one of them no more."""
        with self._lock:
            self._all.discard(stay)

    def within(self, model: nn.Module) -> list[S]:
        """Those in ``model``, or in a part of it, or in something that it is a part of."""
        with self._lock:
            stays = list(self._all)
        return [stay for stay in stays if stay.layout.concerns(model)]
