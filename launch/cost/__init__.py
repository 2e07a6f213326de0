"""`python -m launch.cost`: holds the formulas of `launch.benchmark.formulas` against measurements."""
