"""Trains a small vision transformer on handwritten digits and keeps a sharded average of its weights.

    torchrun --nproc-per-node 2 launch/train.py                          # DDP, CPU or GPUs
    torchrun --nproc-per-node 2 launch/train.py --parallel fsdp2
    python launch/train.py                                               # one process
    torchrun --nproc-per-node 2 --max-restarts 3 launch/train.py --checkpoint-dir runs/checkpoints --resume

The last command continues from its newest checkpoint after SIGTERM or a crash: docs/resuming.md. For several nodes, see
slurm.sbatch.
"""

import argparse
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from ema_dist import HalfLife, ShardedEMA, checkpoint
from recipe.checkpoints import Checkpoints, TrainingProgress
from recipe.data import Batches, load_images
from recipe.evaluation import evaluate
from recipe.metrics import HEADING, EpochMetrics, progress_bar, write_csv, write_curves
from recipe.model import VisionTransformer
from recipe.parallelism import WRAPPERS, data_rank_and_size, default_parallel, process_group, wrap
from recipe.preemption import Preempted, PreemptionHandler
from recipe.stopwatch import stopwatch


def main() -> None:
    args = parse_arguments()
    with process_group(args.device) as device, suppress(Preempted):
        train(args, device)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The recipe: data, model, optimizer, average; then epochs of training and evaluation, with checkpoints."""
    preemption = PreemptionHandler()
    torch.manual_seed(args.seed)
    training, test = load_images(device)
    batches = Batches(training, args.batch_size, args.seed, *data_rank_and_size(args.parallel))
    model = wrap(VisionTransformer(), args.parallel, device)
    optimizer = AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    lr_scheduler = LinearLR(optimizer, start_factor=0.1, total_iters=len(batches))
    ema = ShardedEMA(model, decay=HalfLife(args.half_life))
    progress = TrainingProgress(lr_scheduler)
    checkpoints = Checkpoints(
        args.checkpoint_dir, {"model": model, "optim": optimizer, "ema": ema, "progress": progress}
    )
    save_interval = args.checkpoint_every or len(batches)

    def stop_if_preempted() -> None:
        if preemption.should_stop():
            checkpoints.save(ema.steps, block=True)  # inside swapped() too: the same is saved
            bar.console.print(f"told to stop: stopped at step {ema.steps}")
            raise Preempted

    step_time, update_time = stopwatch(device), stopwatch(device)
    with progress_bar(dist.get_rank()) as bar:
        bar.console.print(checkpoints.resume(is_requested=args.resume))
        task = bar.add_task("steps", total=args.epochs * len(batches), completed=ema.steps)
        bar.console.print(HEADING)
        for epoch in range(len(progress.rows) + 1, args.epochs + 1):
            model.train()
            for pixels, labels in batches.epoch(epoch, first_step=ema.steps - (epoch - 1) * len(batches)):
                stop_if_preempted()
                with step_time:
                    optimizer.zero_grad()
                    F.cross_entropy(model(pixels), labels).backward()
                    optimizer.step()
                    lr_scheduler.step()
                    with update_time:
                        ema.update()
                bar.advance(task)
                is_epoch_end = ema.steps % len(batches) == 0
                if ema.steps % save_interval == 0 and not is_epoch_end:  # else saved below, with the scores
                    checkpoints.save(ema.steps, block=not args.async_checkpoints)

            live = evaluate(model, test, before_batch=stop_if_preempted)
            with ema.swapped():
                average = evaluate(model, test, before_batch=stop_if_preempted)
            # A run that resumed at the end of this epoch has taken no step of it: the share of time is then NaN.
            row = EpochMetrics(epoch, ema.steps, *live, *average, update_time.read() / (step_time.read() or math.nan))
            progress.rows.append(row)
            bar.console.print(str(row))
            if ema.steps % save_interval == 0 or epoch == args.epochs:
                checkpoints.save(ema.steps, block=not args.async_checkpoints)
    checkpoint.wait()

    if dist.get_rank() == 0:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_csv(progress.rows, args.output_dir / "metrics.csv")
        write_curves(progress.rows, args.output_dir / "curves.png")
    if checkpoint.gather(ema, args.output_dir):
        print(f"averaged model: test {progress.rows[-1].average}; in {args.output_dir}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--parallel", choices=WRAPPERS, default=default_parallel(), help="default: ddp on several ranks, else plain")
    option("--device", choices=["auto", "cpu", "cuda"], default="auto")
    option("--half-life", type=float, default=60, metavar="STEPS", help="of the average, in optimizer steps")
    option("--epochs", type=int, default=24)
    option("--batch-size", type=int, default=48, help="images in a step, over all ranks together")
    option("--learning-rate", type=float, default=2e-3)
    option("--seed", type=int, default=0)
    option("--checkpoint-dir", type=Path, help="write checkpoints here")
    option("--checkpoint-every", type=int, metavar="STEPS", help="default: every epoch")
    option("--async-checkpoints", action="store_true", help="write them in the background")
    option("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    option("--output-dir", type=Path, default=Path("runs/digits"), help="for metrics, curves and the averaged model")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if args.checkpoint_every is not None and args.checkpoint_every < 1:
        parser.error("--checkpoint-every must be at least 1")
    if (args.resume or args.checkpoint_every or args.async_checkpoints) and not args.checkpoint_dir:
        parser.error("--resume, --checkpoint-every and --async-checkpoints need --checkpoint-dir")
    return args


if __name__ == "__main__":
    main()
    # Everything is written and the process group destroyed. But gloo's threads sometimes abort the interpreter while it
    # exits (torch 2.13: "terminate called without an active exception"), and torchrun would report a failed run.
    sys.stdout.flush()
    os._exit(0)
