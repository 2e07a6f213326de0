"""Scripts to copy. `recipe` holds what they share; `benchmark` and `cost` are run by `python -m launch.benchmark`."""
