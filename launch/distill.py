"""Teaches handwritten digits with few labels: the average of the student's own weights is its teacher (mean teacher).

    torchrun --nproc-per-node 2 launch/distill.py                      # DDP, CPU or GPUs
    torchrun --nproc-per-node 2 launch/distill.py --parallel fsdp2
    python launch/distill.py --consistency 0                           # labels only, to compare

At each step the teacher predicts between the student's forward and backward pass, in the student's own model: there is
no second model, and no weight is copied. Source: Tarvainen and Valpola, "Mean teachers are better role models", 2017.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import AdamW

from ema_dist import HalfLife, ShardedEMA
from recipe.data import Batches, Images, load_images
from recipe.evaluation import evaluate
from recipe.model import VisionTransformer
from recipe.parallelism import add_layout_options, data_rank_and_size, describe_run, process_group, wrap
from recipe.preemption import Preempted, PreemptionHandler
from recipe.script import OptionParser, positive_int, print_rank_0, run_script


def main() -> None:
    args = parse_arguments()
    with process_group(args.device) as device:
        distill(args, device)


def distill(args: argparse.Namespace, device: torch.device) -> None:
    """The recipe: each step takes all labelled and some unlabelled images; each epoch scores student and teacher."""
    preemption = PreemptionHandler()
    torch.manual_seed(args.seed)
    training, test = load_images(device)
    labelled = Images(training.pixels[: args.labels], training.labels[: args.labels])
    rank_and_size = data_rank_and_size(args.parallel)
    labelled_batches = Batches(labelled, args.labels, args.seed, *rank_and_size)  # one step an epoch
    batches = Batches(training, args.batch_size, args.seed, *rank_and_size)  # the labels are not used
    net = VisionTransformer()
    law = HalfLife(args.half_life, ramp=0.1)  # the ramp makes the teacher forget the initial weights soon
    print_rank_0(describe_run(args.parallel, device.type, net, law))
    model = wrap(net, args.parallel, device)
    optimizer = AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    # Each replica keeps full averages: the teacher predicts at each step, and need not gather them.
    ema = ShardedEMA(model, decay=law, replicas="copy")
    print_rank_0(f"results are only printed; teaching from {ema.serving_mode}")
    torch.manual_seed(args.seed + dist.get_rank())  # each rank draws its own noise

    steps = args.epochs * len(batches)
    for epoch in range(1, args.epochs + 1):
        model.train()
        for pixels, _ in batches.epoch(epoch):
            if preemption.should_stop():
                print_rank_0(f"stopped by a signal at step {ema.steps}, nothing saved: this script writes no files")
                raise Preempted(1)
            labelled_pixels, labels = next(labelled_batches.epoch(ema.steps))
            noisy_pixels = pixels + args.noise * torch.randn_like(pixels)
            optimizer.zero_grad()
            labelled_logits, noisy_logits = model(torch.cat([labelled_pixels, noisy_pixels])).split(
                [len(labelled_pixels), len(noisy_pixels)]
            )
            with ema.serving():  # the student's autograd graph stays intact
                targets = model(pixels).softmax(dim=1)
            consistency = (
                args.consistency
                * consistency_ramp(ema.steps / steps)
                * F.mse_loss(noisy_logits.softmax(dim=1), targets)
            )
            (F.cross_entropy(labelled_logits, labels) + consistency).backward()
            optimizer.step()
            ema.update()
        student = evaluate(model, test)
        with ema.serving():
            teacher = evaluate(model, test)
        print_rank_0(f"epoch {epoch:3}  student: {student}  teacher: {teacher}")
    print_rank_0(f"averaged model: test {teacher}, of {args.labels} labels")


def consistency_ramp(progress: float) -> float:
    """Weight of the consistency loss: small while the teacher knows little, 1 after a third of the training."""
    return min(1.0, 3 * progress) ** 2


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(__doc__)
    option = parser.option
    add_layout_options(parser)
    option("--labels", "training images that have a label", type=positive_int, default=48, metavar="IMAGES")
    option("--consistency", "weight of agreeing with the teacher", type=float, default=20.0, metavar="WEIGHT")
    option("--noise", "noise added to the images that the student sees", type=float, default=0.3)
    option("--half-life", "half-life of the average, in optimizer steps", type=float, default=20.0, metavar="STEPS")
    option("--epochs", "total epochs", type=positive_int, default=20)
    option("--batch-size", "unlabelled images in a step, over all ranks together", type=positive_int, default=96)
    option("--learning-rate", "learning rate of AdamW", type=float, default=2e-3)
    option("--seed", "seed of the initial weights, the noise and the order of images", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
