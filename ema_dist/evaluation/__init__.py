"""Averages in the model: the swap, serving without a swap, and the record of who is inside either.

How averages are stored and follow the live weights belongs to `averages`. May import `averages`, `communication` and
the rooms below these.
"""
