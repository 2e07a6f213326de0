"""How messages name things."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet


def few(names: Iterable[str], count: int = 10, between: str = ", ") -> str:
    """The first of these, and how many more there are: a model has thousands of tensors, and a message one point."""
    every = list(names)
    more = f" and {len(every) - count} more" if len(every) > count else ""
    return between.join(every[:count]) + more


def apart(one: str, ours: AbstractSet[str], other: str, theirs: AbstractSet[str]) -> str:
    """Which names only one of two has, with what these two are called; empty where none are."""
    both = {one: ours - theirs, other: theirs - ours}
    return "; ".join(f"only {whose} has {few(sorted(names))}" for whose, names in both.items() if names)
