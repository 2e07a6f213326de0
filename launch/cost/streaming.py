"""Measures how long `gather()` and `full_state_dict()` take to update an inference engine's weights, and their memory.

python -m launch.cost.streaming --output-dir docs   # a minute or two; writes the lower half of docs/weight-streaming.md
python -m launch.cost.streaming --quick             # a quick check with a tiny model
"""

from collections.abc import Iterable
from typing import Any

import torch

from ema_dist import ShardedEMA
from launch.benchmark.cases import Case, Parallel, Transformer
from launch.benchmark.measure import FileMethod, Record, is_first, measure_files
from launch.benchmark.page import Environment, Page, Table, comparison, entry, mib
from launch.benchmark.run import Run, argument_parser, make_console, parse
from launch.recipe.weight_sync import Engine

LAYOUTS: list[Parallel] = ["fsdp2", "ddp"]
WHOLE = "full_state_dict(), then sent"
"""Listed first in `methods`, so the other method is compared with it."""
STREAMED = "gather(), sent one by one"


def main() -> None:
    parser = argument_parser("launch.cost.streaming", __doc__, output_dir="runs/streaming")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each case, at least 2")
    args = parse(parser)
    run = Run(args.device, args.repeats, make_console())
    shape = Transformer(1, 18, 97) if args.quick else Transformer()
    environment = Environment.here(args.device)
    records = [record for parallel in LAYOUTS for record in run.measure(measure_streaming, Case(parallel, 2, shape))]
    table = Table.by_method(
        "Measured: one update of the engine's weights, until it has copied all of them",
        records,
        {
            "model": lambda record, _: f"{record['case']}, {mib(record['bytes'])} MiB",
            "update": lambda _, name: name,
            **comparison("s", lambda seconds: f"{seconds:.2f}", digits=2),
            "most extra memory of a rank, MiB": entry("extra_bytes", mib),
        },
        once=("model",),
    )
    notes = ["Ranks and the engine, a process each, share this machine. The engine copies each tensor; no checksums."]
    page = Page(environment, run.not_measured, {"streaming": records}, notes=notes, targets=[], tables=[table])
    names = {"data_name": "streaming.json", "page_name": "weight-streaming.md"}
    run.show_and_write(page, args.output_dir, **names, program="launch.cost.streaming")


def measure_streaming(device: torch.device, *, case: Case, repeats: int) -> list[Record]:
    """Seconds and extra memory of each method, by round. Collective: every rank."""
    ema = ShardedEMA(case.build_model(device), decay=0.5)
    engine = Engine(case.shape.build, verifies=False) if is_first() else None

    def send(weights: Iterable[tuple[str, Any]]) -> None:
        if engine:
            engine.update_weights(weights)
        else:
            for _ in weights:
                pass

    methods = {
        WHOLE: FileMethod(lambda: send(ema.full_state_dict().items())),
        STREAMED: FileMethod(lambda: send(ema.gather())),
    }
    record = measure_files(methods, repeats=repeats, device=device)
    if engine:
        engine.stop()
    sizes = (value.nbytes for value in ema.full_shapes().values() if value is not None)
    return [{"case": case, "bytes": sum(sizes)} | record]


if __name__ == "__main__":
    main()
