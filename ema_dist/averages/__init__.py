"""This rank's averages: what is stored, in which dtype and where, and how it follows the live weights.

Tracks, precision, CPU offload, the optimizer hook, the state that checkpoints hold, and the way from shards to full
weights and back. The model's own storage belongs to `evaluation`, and files to `checkpoint`. May import `schedules`,
`communication`, `sharding` and `kernels`.
"""
