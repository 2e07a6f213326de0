"""Chooses which checkpoints are summed with which coefficients: merges, and averages chosen after training.

`merging` takes the weights in a series of checkpoints, with coefficients from `decay_coefficients`. `snapshots` reads
which averages a series holds, and `reconstruction` fits them to a profile. Both write by `checkpoint.weighted_sum`.
"""
