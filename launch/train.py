"""Trains a small vision transformer on handwritten digits and keeps a sharded average of its weights.

    torchrun --nproc-per-node 2 launch/train.py                          # DDP, CPU or GPUs
    torchrun --nproc-per-node 2 launch/train.py --parallel fsdp2
    python launch/train.py                                               # one process
    torchrun --nproc-per-node 2 --max-restarts 3 launch/train.py --checkpoint-dir runs/checkpoints --resume

The last command continues from its newest checkpoint after SIGTERM, Ctrl-C or a crash: docs/resuming.md. For several
nodes, see slurm.sbatch.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from ema_dist import ShardedEMA, checkpoint
from recipe.averaging_laws import DEFAULT_HALF_LIFE, DEFAULT_LAW, LAWS, WITHOUT_HALF_LIFE, make_law
from recipe.checkpoints import (
    Checkpoints,
    TrainingProgress,
    checkpoint_errors_as_script_errors,
    resume_or_start,
    saved_settings,
)
from recipe.data import Batches, load_images
from recipe.evaluation import evaluate
from recipe.folders import claim_output_dir, describe_checkpoint_dir, new_run_id
from recipe.metrics import HEADING, EpochMetrics, TensorBoard, progress_bar, write_metrics
from recipe.model import VisionTransformer
from recipe.parallelism import add_layout_options, data_rank_and_size, describe_run, process_group, wrap
from recipe.preemption import Preempted, PreemptionHandler
from recipe.script import OptionParser, positive_int, print_rank_0, run_script
from recipe.stopwatch import stopwatch


def main() -> None:
    args = parse_arguments()
    with checkpoint_errors_as_script_errors(), process_group(args.device) as device:
        train(args, device, TensorBoard(args.output_dir if args.tensorboard else None))


def train(args: argparse.Namespace, device: torch.device, tensorboard: TensorBoard) -> None:
    """The recipe: data, model, optimizer, average; then epochs of training and evaluation, with checkpoints."""
    preemption = PreemptionHandler()
    torch.manual_seed(args.seed)
    training, test = load_images(device)
    batches = Batches(training, args.batch_size, args.seed, *data_rank_and_size(args.parallel))
    law, net = make_law(args.schedule, args.half_life, args.epochs * len(batches)), VisionTransformer()
    print_rank_0(
        describe_run(args.parallel, device.type, net, law),
        f"results in {args.output_dir}; {describe_checkpoint_dir(args.checkpoint_dir)}",
    )
    model = wrap(net, args.parallel, device)
    optimizer = AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    lr_scheduler = LinearLR(optimizer, start_factor=0.1, total_iters=len(batches))
    ema = ShardedEMA(model, decay=law)
    progress = TrainingProgress(new_run_id(), lr_scheduler)
    checkpoints = Checkpoints(
        args.checkpoint_dir,
        {"model": model, "optim": optimizer, "ema": ema, "progress": progress},
        settings=saved_settings(training, args) | {"--switch-each-epoch": args.switch_each_epoch},
    )
    save_interval = args.checkpoint_every or len(batches)

    def stop_if_preempted() -> None:
        if preemption.should_stop():
            checkpoints.save(ema.steps, block=True)  # also inside swapped(): the checkpoint is the same
            saved = f"saved in {args.checkpoint_dir}" if args.checkpoint_dir else "nothing saved: no --checkpoint-dir"
            bar.console.print(f"stopped by a signal at step {ema.steps}, {saved}")
            raise Preempted(0 if args.checkpoint_dir else 1)

    step_time, update_time = stopwatch(device), stopwatch(device)
    with progress_bar(dist.get_rank()) as bar:
        bar.console.print(resume_or_start(checkpoints, ema, resume=args.resume, start_from=args.start_from))
        # Only after resume(), which loads the run's identifier: a run recognizes its own results by the identifier.
        claim_output_dir(args.output_dir, progress.run_id, option="--output-dir")
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
                # The end of an epoch is saved below, with the scores.
                if ema.steps % save_interval == 0 and ema.steps % len(batches):
                    checkpoints.save(ema.steps, block=not args.async_checkpoints)

            live = evaluate(model, test, before_batch=stop_if_preempted)
            with ema.swapped():
                average = evaluate(model, test, before_batch=stop_if_preempted)
            # A run that resumed at the end of this epoch has taken no step of it: the share of time is then NaN.
            progress.rows.append(
                EpochMetrics(
                    *(epoch, ema.steps, *live, *average),
                    average_distance=ema.distance(),
                    update_share_of_step_time=update_time.read() / (step_time.read() or math.nan),
                )
            )
            tensorboard.add(progress.rows[-1], ema.metrics())
            bar.console.print(str(progress.rows[-1]))
            if args.switch_each_epoch:
                ema.copy_to(ema.model)  # the optimizer keeps its moments
            if ema.steps % save_interval == 0 or epoch == args.epochs:
                checkpoints.save(ema.steps, block=not args.async_checkpoints)
    checkpoint.wait()

    write_results(ema, progress.rows, args.output_dir)


def write_results(ema: ShardedEMA, rows: list[EpochMetrics], folder: Path) -> None:
    """Writes metrics, curves and the averaged model. Collective: every rank."""
    write_metrics(rows, folder)
    if checkpoint.gather(ema, folder):
        print(f"averaged model: test {rows[-1].average}; in {folder}")


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(__doc__)
    option = parser.option
    add_layout_options(parser)
    option(
        "--schedule",
        "averaging law; ramped is a half-life with a warm-up, power has sigma_rel=0.1",
        choices=LAWS,
        default=DEFAULT_LAW,
    )
    without = " and ".join(sorted(WITHOUT_HALF_LIFE))
    half_life = f"half-life of the average, in optimizer steps; not for {without} (default: {DEFAULT_HALF_LIFE:g})"
    option("--half-life", half_life, type=float, metavar="STEPS")
    option("--epochs", "total epochs, including those before --resume", type=positive_int, default=24)
    option("--batch-size", "images in a step, over all ranks together", type=positive_int, default=48)
    option("--learning-rate", "peak learning rate of AdamW, reached after one epoch", type=float, default=2e-3)
    option("--seed", "seed of the initial weights and of the order of images", type=int, default=0)
    option("--checkpoint-dir", "folder for checkpoints, of which the newest three are kept", type=Path)
    option("--checkpoint-every", "steps between checkpoints (default: one epoch)", type=positive_int, metavar="STEPS")
    option("--async-checkpoints", "write checkpoints in the background", action="store_true")
    option("--resume", "continue from the newest checkpoint, if there is one", action="store_true")
    option("--start-from", "weights to start from: a folder by ema-dist merge, export or dcp.save", type=Path)
    option("--switch-each-epoch", "replace live weights by averages after each epoch (Switch EMA)", action="store_true")
    option("--output-dir", "folder for metrics, curves and the averaged model", type=Path, default=Path("runs/digits"))
    option("--tensorboard", "write scores and ema.metrics() into --output-dir, for TensorBoard", action="store_true")
    args = parser.parse_args()
    if (args.resume or args.checkpoint_every or args.async_checkpoints) and not args.checkpoint_dir:
        parser.error("--resume, --checkpoint-every and --async-checkpoints need --checkpoint-dir")
    return args


if __name__ == "__main__":
    run_script(main)
