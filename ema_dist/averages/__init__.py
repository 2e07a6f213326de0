"""This rank's averages: the model they follow, what is stored, in which dtype and where, and how it is updated.

The model that has averages, tracks, precision, CPU offload, the optimizer hook, the state that checkpoints hold, and the
way from shards to full weights and back. Putting averages into the model belongs to `evaluation`, and files to
`checkpoint`. May import `schedules`, `communication`, `sharding` and `kernels`.
"""
