"""Averages in the model: the swap and its journal, serving without a swap, the ``with`` blocks of both, what is active.

How averages are stored and updated belongs to `averages`. May import `averages`, `communication` and lower
levels.
"""
