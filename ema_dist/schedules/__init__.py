"""How much each update weighs: decays as pure equations, and the clock that counts steps and updates.

Nothing here knows a model, a shard or a rank. Imports nothing else of `ema_dist`.
"""
