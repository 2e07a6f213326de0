"""How messages name things."""

from __future__ import annotations

from collections.abc import Iterable


def few(names: Iterable[str], count: int = 10) -> str:
    """The first of these, and how many more there are: a model has thousands of tensors, and a message one point."""
    every = list(names)
    more = f" and {len(every) - count} more" if len(every) > count else ""
    return ", ".join(every[:count]) + more
