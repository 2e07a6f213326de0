"""Measures the time of a checkpoint on 64 processes with tiny tensors, where planning dominates.

python -m launch.cost.saves --output-dir docs     # takes minutes; writes the results in docs/saves.md
python -m launch.cost.saves --quick               # a quick check, on 4 ranks
"""

import statistics
import tempfile
from functools import partial
from itertools import count
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
"""The first method, with which the others are compared."""


def main() -> None:
    parser = argument_parser("launch.cost.saves", __doc__, output_dir="runs/saves")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, at least 2")
    args = parse(parser)
    console = make_console()
    environment = Environment.here("cpu")
    ranks, tensors = (4, 3) if args.quick else (RANKS, TENSORS)
    with tempfile.TemporaryDirectory() as folder, console.status(f"{ranks} ranks"):
        measure = partial(measure_saves, folder=Path(folder), tensors=tensors, repeats=args.repeats)
        record = on_ranks(measure, ranks, "cpu")
    page = saves_page(environment, record, ranks=ranks)
    for table in page.tables:
        console.print(table.for_terminal())
    page.write(args.output_dir, data="saves.json", page="saves.md", program="launch.cost.saves")
    console.print(f"in {args.output_dir}: saves.json, saves.md")


def saves_page(environment: Environment, record: Record, *, ranks: int) -> Page:
    times = "; ".join(f"{name} {statistics.median(seconds):.2f} s" for name, seconds in record["seconds"].items())
    return Page(
        environment,
        [],
        {"saves": [record]},
        notes=[f"The {ranks} ranks are processes that share this machine. The time is that of the slowest rank."],
        targets=[],
        tables=[
            Table.by_method(
                f"Measured: model and averages of {record['tensors']} tensors, sharded by FSDP2",
                [record],
                {"save": lambda _, name: name, **comparison("s", lambda seconds: f"{seconds:.2f}", digits=2)},
                once=(),
                words=1,
            )
        ],
        summary=[f"**To save {record['tensors']} small tensors and their averages from {ranks} ranks:** {times}."],
    )


def measure_saves(device: torch.device, *, folder: Path, tensors: int, repeats: int) -> Record:
    """Seconds of each way to save, by round. Collective: every rank."""
    model = nn.Sequential(*(nn.Linear(2, 64, bias=False) for _ in range(tensors)))
    for module in [*model, model]:
        fully_shard(module)
    ema = ShardedEMA(model, decay=0.5)
    rounds = count()

    def save(target: Path, **more: object) -> None:
        checkpoint.save({"model": model, "ema": ema, **more}, target, step=0)

    def save_by_dcp(target: Path, *, reuses_plan: bool) -> None:
        planner = DefaultSavePlanner(enable_plan_caching=reuses_plan)
        dcp.save({"model": model.state_dict(), "ema": ema.state_dict()}, checkpoint_id=target, planner=planner)

    targets = [folder / name for name in ("dcp", "dcp-reused", "planned", "reused", "before")]
    methods = {
        PLAIN: FileMethod(partial(save_by_dcp, targets[0], reuses_plan=False), targets[0]),
        "`dcp.save`, plan reused": FileMethod(partial(save_by_dcp, targets[1], reuses_plan=True), targets[1]),
        # The state has a different key in each round, so no plan of an earlier round fits.
        "`checkpoint.save`, planned": FileMethod(
            lambda: save(targets[2], **{f"round {next(rounds)}": True}), targets[2]
        ),
        # An untimed save first makes a plan that the timed save can reuse.
        "`checkpoint.save`, plan reused": FileMethod(
            partial(save, targets[3]), targets[3], before=partial(save, targets[4])
        ),
    }
    return {"tensors": tensors} | measure_files(methods, repeats=repeats, device=device)


if __name__ == "__main__":
    main()
