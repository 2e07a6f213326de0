"""Attacks on readers of checkpoints, each a script: ``python -m tests.attacks`` makes and tries them all.

A module here is one attack. Its docstring is the threat. ``make(folder, harm)`` writes the checkpoint; an attack that
succeeds creates the file ``harm``. ``read_by_torch(folder, harm)`` shows that it succeeds against an ordinary reader.
`trial.py` reads the same folder by every command of ``ema-dist`` and by `ema_dist.checkpoint`.
"""
