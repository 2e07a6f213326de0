"""`python -m launch.benchmark`: what averages and their checkpoints cost, beside other ways to do the same.

A case gives a record, a page of tables shows records, and the JSON is the records. Timing, memory and ranks are in
`measure`. `python -m launch.benchmark.rendezvous` is a command of its own. Code that a training script could copy
belongs in `launch.recipe`, which this package may import.

No library times here. `torch.utils.benchmark` measures one statement after another in one process; here, rounds of
several methods alternate on several ranks, because the machine's speed drifts. tabulate and pandas would render the
Markdown tables, which take a dozen lines in `page`, and neither renders them on the terminal as rich does.
"""
