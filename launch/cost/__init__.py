"""`python -m launch.cost`: compares the formulas of `launch.benchmark.formulas` with measurements."""
