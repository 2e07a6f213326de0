"""`python -m launch.cost`: compares the formulas of `launch.benchmark.formulas` with measurements.

`python -m launch.cost.scale` measures the host's time on thousands of ranks.

The formulas themselves are used by the benchmark too, and belong there. May import `launch.benchmark`.
"""
