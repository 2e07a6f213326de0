"""Modules that the scripts of `launch` share: from data, model and parallelism to checkpoints, preemption and errors.

They use only the public API of `ema_dist`. Options and training loops belong to the scripts, and measurements to
`launch.benchmark` and `launch.cost`, which import from here.
"""
