"""The registry of swaps and servings that are active in this process."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar
from weakref import ref

from torch import nn

from ema_dist.sharding import Layout


class HasLayout(Protocol):
    """A swap or a serving of the model that ``layout`` describes."""

    layout: Layout


S = TypeVar("S", bound=HasLayout)


class ActiveRegistry(Generic[S]):
    """Active swaps or servings, of any number of models; safe to use from several threads.

    It has no lock, because an exception between two bytecodes could leave it locked. Each change is one dict operation.
    """

    def __init__(self) -> None:
        # Weak, so that an average whose swap was never left can still be freed.
        self._entries: dict[int, ref[S]] = {}

    def add(self, entry: S) -> None:
        """Record the start of ``entry``."""
        entries, key = self._entries, id(entry)
        entries[key] = ref(entry, lambda _: entries.pop(key, None))

    def remove(self, entry: S) -> None:
        """Record the end of ``entry``."""
        self._entries.pop(id(entry), None)

    def overlapping(self, model: nn.Module) -> list[S]:
        """The entries whose model shares modules or parameters with ``model``; either may contain the other."""
        entries = [reference() for reference in list(self._entries.values())]
        return [entry for entry in entries if entry is not None and entry.layout.shares_modules_with(model)]
