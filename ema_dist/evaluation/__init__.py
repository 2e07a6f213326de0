"""Puts averages into the model: the swap and its journal, serving without a swap, and the ``with`` blocks of both.

`averages` stores and updates the averages. May import `averages`, `communication` and lower levels.
"""
