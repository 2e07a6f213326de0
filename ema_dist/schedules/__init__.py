"""The weight of each update: averaging laws as equations and as objects, and the clock.

No module here knows a model, a shard or a rank, or imports another part of `ema_dist`. From the lowest level up:
`arithmetic` (numbers and 0-d tensors alike), `equations`, `schedule` (what a law is), `laws`, `clock` (which steps
update the averages, and with which weight), `decay` (what users pass and what states record).
"""
