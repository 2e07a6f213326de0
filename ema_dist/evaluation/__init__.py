"""Averages in the model: the swap, serving without a swap, and the record of which of them are active.

How averages are stored and updated belongs to `averages`. May import `averages`, `communication` and the rooms below
these.
"""
