"""`python -m launch.benchmark`: compares the cost of averages and their checkpoints with that of alternatives.

Each case yields records. A page shows records in tables, and its JSON file holds them. `measure` has the timing and the
memory, `run` starts the ranks. `python -m launch.benchmark.rendezvous` is a separate command. Code that a training
script could copy belongs in `launch.recipe`, which this package may import.

No benchmark library is used. `torch.utils.benchmark` measures one statement after another in one process; here, rounds
of several methods alternate on several ranks, because the machine's speed drifts. tabulate and pandas would render the
Markdown tables, which take a dozen lines in `page`, and neither renders them on the terminal as rich does.
"""
