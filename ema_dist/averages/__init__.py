"""This rank's averages: the live model, what is stored, in which dtype and where, and how it is updated.

This folder has the live model, construction on all ranks, tracks, updates that can be interrupted, precision, CPU
offload, the optimizer hook, the state stored in checkpoints, and the conversion between shards and full weights.
`evaluation` puts averages into the model, and `checkpoint` handles files. May import `schedules`, `communication`,
`sharding` and `kernels`.
"""
