"""Trains a small vision transformer on handwritten digits and keeps a sharded average of its weights.

    torchrun --nproc-per-node 2 launch/train.py                          # DDP, CPU or GPUs
    torchrun --nproc-per-node 2 launch/train.py --parallel fsdp2
    torchrun --nproc-per-node 2 launch/train.py --checkpoint-dir runs/checkpoints --resume
    python launch/train.py                                               # one process

On several nodes: see slurm.sbatch.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR, LRScheduler

import checkpoint
from data import Batches, load_images
from ema_dist import HalfLife, ShardedEMA
from evaluate import evaluate
from model import VisionTransformer
from parallel import WRAPS, data_shard, default_parallel, process_group, wrap
from report import HEADING, Row, progress_bar, write_csv, write_curves
from stopwatch import stopwatch


@dataclass
class Progress:
    """How far a run has come: a DCP `Stateful`."""

    schedule: LRScheduler
    rows: list[Row] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        # One string: DCP would give each row keys of its own, which a run that has yet to load them cannot ask for.
        return {"schedule": self.schedule.state_dict(), "rows": json.dumps([asdict(row) for row in self.rows])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict["schedule"])
        self.rows = [Row(**row) for row in json.loads(state_dict["rows"])]


def main() -> None:
    args = parse_arguments()
    with process_group(args.device) as device:
        train(args, device)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The recipe: data, model, optimizer, average; then epochs of training, evaluation and a checkpoint."""
    torch.manual_seed(args.seed)
    training, test = load_images(device)
    batches = Batches(training, args.batch_size, args.seed, *data_shard(args.parallel))
    model = wrap(VisionTransformer(), args.parallel, device)
    optimizer = AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = LinearLR(optimizer, start_factor=0.1, total_iters=len(batches))
    ema = ShardedEMA(model, decay=HalfLife(args.half_life))

    progress = Progress(schedule)
    if args.checkpoint_dir and (path := checkpoint.latest(args.checkpoint_dir)):
        if not args.resume:
            raise ValueError(f"{path} is from an earlier run: pass --resume to continue it or another --checkpoint-dir")
        checkpoint.load(path, model, optimizer, ema=ema, progress=progress)

    step_time, update_time = stopwatch(device), stopwatch(device)
    with progress_bar(dist.get_rank()) as bar:
        task = bar.add_task("steps", total=args.epochs * len(batches), completed=ema.steps)
        bar.console.print(HEADING)
        for epoch in range(len(progress.rows) + 1, args.epochs + 1):
            model.train()
            for pixels, labels in batches.epoch(epoch):
                with step_time:
                    optimizer.zero_grad()
                    F.cross_entropy(model(pixels), labels).backward()
                    optimizer.step()
                    schedule.step()
                    with update_time:
                        ema.update()
                bar.advance(task)

            live = evaluate(model, test)
            with ema.swapped():
                average = evaluate(model, test)
            row = Row(epoch, ema.steps, *live, *average, update_time.read() / step_time.read())
            progress.rows.append(row)
            bar.console.print(str(row))
            if args.checkpoint_dir:
                checkpoint.save(args.checkpoint_dir, epoch, model, optimizer, ema=ema, progress=progress)

    averaged_weights = ema.full_state_dict()
    if dist.get_rank() == 0:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        save_file(averaged_weights, args.output_dir / "model.safetensors")
        write_csv(progress.rows, args.output_dir / "metrics.csv")
        write_curves(progress.rows, args.output_dir / "curves.png")
        print(f"averaged model: test {progress.rows[-1].average}; in {args.output_dir}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--parallel", choices=WRAPS, default=default_parallel(), help="default: ddp on several ranks, else plain")
    option("--device", choices=["auto", "cpu", "cuda"], default="auto")
    option("--half-life", type=float, default=60, metavar="STEPS", help="of the average, in optimizer steps")
    option("--epochs", type=int, default=24)
    option("--batch-size", type=int, default=48, help="images in a step, over all ranks together")
    option("--learning-rate", type=float, default=2e-3)
    option("--seed", type=int, default=0)
    option("--checkpoint-dir", type=Path, help="write a checkpoint here after every epoch")
    option("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    option("--output-dir", type=Path, default=Path("runs/digits"), help="for metrics, curves and the averaged model")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if args.resume and not args.checkpoint_dir:
        parser.error("--resume needs --checkpoint-dir")
    return args


if __name__ == "__main__":
    main()
    # All is written and the process group gone; but gloo's threads sometimes abort the interpreter while it ends (torch
    # 2.13: "terminate called without an active exception"), and torchrun would take the run for a failed one.
    sys.stdout.flush()
    os._exit(0)
