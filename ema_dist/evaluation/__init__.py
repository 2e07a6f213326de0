"""Averages in the model: the swap, serving without a swap, and the registry of active swaps and servings.

How averages are stored and updated belongs to `averages`. May import `averages`, `communication` and lower
levels.
"""
