"""`python -m launch.cost`: compares the formulas of `launch.benchmark.formulas` with measurements.

The formulas themselves are used by the benchmark too, and belong there. May import `launch.benchmark`.
"""
