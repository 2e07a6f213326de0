"""Training scripts to copy: plain torch, Composer, a mean teacher, and the evaluation of averaged weights.

`recipe` holds the modules that they share. `benchmark` and `cost` hold the measurements: `python -m launch.benchmark`
and `python -m launch.cost`. The scripts import neither. They are run by path, which puts this folder on `sys.path`:
nothing here may have the name of another package (tests/test_paths.py).
"""
