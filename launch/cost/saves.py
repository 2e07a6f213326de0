"""Measures what a checkpoint takes on 64 real ranks whose tensors are tiny, so that planning and agreement count.

python -m launch.cost.saves --output-dir docs     # some minutes; writes the lower half of docs/saves.md
python -m launch.cost.saves --quick               # on 4 ranks: whether it works at all
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.fsdp import fully_shard

from ema_dist import ShardedEMA, checkpoint
from launch.benchmark.measure import FileMethod, Record, measure_files
from launch.benchmark.page import Environment, Page, Table, comparison
from launch.benchmark.run import argument_parser, make_console, on_ranks, parse

RANKS, TENSORS = 64, 200
PLAIN = "`dcp.save`"
"""First, so that the others are compared with it."""


def main() -> None:
    parser = argument_parser("launch.cost.saves", __doc__, output_dir="runs/saves")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, 2 or more")
    args: argparse.Namespace = parse(parser)
    console = make_console()
    environment = Environment.here("cpu")
    ranks, tensors = (4, 3) if args.quick else (RANKS, TENSORS)
    with tempfile.TemporaryDirectory() as folder, console.status(f"{ranks} ranks"):
        measure = partial(measure_saves, folder=Path(folder), tensors=tensors, repeats=args.repeats)
        record = on_ranks(measure, ranks, "cpu")
    page = Page(
        environment,
        [],
        {"saves": [record]},
        notes=[f"{ranks} ranks, a process each, share this machine; the slowest rank counts."],
        targets=[],
        tables=[
            Table.by_method(
                f"Measured: model and averages of {tensors} tensors, sharded by FSDP2",
                [record],
                {"save": lambda _, name: name, **comparison("s", lambda seconds: f"{seconds:.2f}", digits=2)},
                once=(),
                words=1,
            )
        ],
    )
    for table in page.tables:
        console.print(table.for_terminal())
    page.write(args.output_dir, data="saves.json", page="saves.md", program="launch.cost.saves")
    console.print(f"in {args.output_dir}: saves.json, saves.md")


def measure_saves(device: torch.device, *, folder: Path, tensors: int, repeats: int) -> Record:
    """Seconds of each way to save. Collective: every rank."""
    model = nn.Sequential(*(nn.Linear(2, 64, bias=False) for _ in range(tensors)))
    for module in [*model, model]:
        fully_shard(module)
    ema = ShardedEMA(model, decay=0.5)
    state = {"model": model, "ema": ema}
    rounds = iter(range(2 * repeats + 2))

    def save(*, name: str, changes: bool) -> None:
        extra = {f"round {next(rounds)}": True} if changes else {}
        checkpoint.save(state | extra, folder / name, step=0)

    def save_plain(*, reuses_plan: bool) -> None:
        planner = DefaultSavePlanner(enable_plan_caching=reuses_plan)
        state_dict = {"model": model.state_dict(), "ema": ema.state_dict()}
        dcp.save(state_dict, checkpoint_id=folder / f"plain-{reuses_plan}", planner=planner)

    def method(run: "partial[None]", name: str, before: "partial[None] | None" = None) -> FileMethod:
        return FileMethod(run, folder / name, before or (lambda: None))

    methods = {
        PLAIN: method(partial(save_plain, reuses_plan=False), "plain-False"),
        "`dcp.save` with a plan cache": method(partial(save_plain, reuses_plan=True), "plain-True"),
        "`checkpoint.save`, the first": method(partial(save, name="first", changes=True), "first"),
        "`checkpoint.save`, later ones": method(
            partial(save, name="later", changes=False), "later", partial(save, name="before", changes=False)
        ),
    }
    return {"tensors": tensors} | measure_files(methods, repeats=repeats, device=device)


if __name__ == "__main__":
    main()
