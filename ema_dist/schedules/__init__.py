"""The weight of each update: decays as pure equations, and the clock that counts steps and updates.

No module here knows a model, a shard or a rank, or imports another part of `ema_dist`.
"""
