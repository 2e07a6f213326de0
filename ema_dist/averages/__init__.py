"""This rank's averages: the live model, what is stored, in which dtype and where, and how it is updated.

Here are the live model, construction on all ranks, tracks, updates that can be interrupted, precision, CPU offload, the
optimizer hook, the state that checkpoints hold, and the conversion between shards and full weights. Putting averages
into the model belongs to `evaluation`, and files belong to `checkpoint`. May import `schedules`, `communication`,
`sharding` and `kernels`.
"""
