"""`python -m launch.benchmark`: what averages and their checkpoints cost, beside other ways to do the same."""
