"""Trains handwritten digits, and streams the averages to an inference engine after each epoch, without a swap.

    torchrun --nproc-per-node 2 launch/stream_weights.py                      # DDP, CPU or GPUs
    torchrun --nproc-per-node 2 launch/stream_weights.py --parallel fsdp2

The engine is a stand-in: a process with its own copy of the model. It receives every tensor by name, compares its
checksum with that of the tensor sent, and evaluates its weights on the test images. At the end the trainer evaluates
its averages, too.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

from ema_dist import HalfLife, ShardedEMA
from recipe.data import Batches, load_images
from recipe.evaluation import Scores, evaluate
from recipe.model import VisionTransformer
from recipe.parallelism import add_layout_options, data_rank_and_size, describe_run, process_group, wrap
from recipe.preemption import Preempted, PreemptionHandler
from recipe.script import OptionParser, positive_int, print_rank_0, run_script
from recipe.weight_sync import Engine


def main() -> None:
    args = parse_arguments()
    with process_group(args.device) as device:
        train(args, device)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train, and update the engine's weights after each epoch."""
    preemption = PreemptionHandler()
    torch.manual_seed(args.seed)
    training, test = load_images(device)
    batches = Batches(training, args.batch_size, args.seed, *data_rank_and_size(args.parallel))
    net = VisionTransformer()
    law = HalfLife(args.half_life, ramp=0.1)
    print_rank_0(describe_run(args.parallel, device.type, net, law))
    model = wrap(net, args.parallel, device)
    optimizer = AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    ema = ShardedEMA(model, decay=law)
    engine = Engine(VisionTransformer, score) if dist.get_rank() == 0 else None
    for epoch in range(1, args.epochs + 1):
        model.train()
        for pixels, labels in batches.epoch(epoch):
            if preemption.should_stop():
                print_rank_0(f"stopped by a signal at step {ema.steps}, nothing saved: this script writes no files")
                raise Preempted(1)
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
            ema.update()
        stream(ema, engine, epoch)
    if engine:
        engine.stop()
    with ema.swapped():
        scores = evaluate(model, test)
    print_rank_0(f"the averages in the trainer: {scores}")


def stream(ema: ShardedEMA, engine: Engine | None, epoch: int) -> None:
    """Update the engine's weights. Collective: every rank gathers; the first one sends each tensor at once."""
    entries = ema.gather()
    if engine is None:
        for _ in entries:  # the first rank's tensors need this rank's parts
            pass
        return
    verified, answer = engine.update_weights(entries)
    print(f"epoch {epoch:3}  engine: {verified} tensors verified, {Scores(*answer)}", flush=True)


def score(model: nn.Module) -> Scores:
    """Evaluate the engine's model on the test images; runs in the engine's process."""
    return evaluate(model, load_images(torch.device("cpu"))[1])


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(__doc__)
    option = parser.option
    add_layout_options(parser)
    option("--half-life", "half-life of the average, in optimizer steps", type=float, default=60.0, metavar="STEPS")
    option("--epochs", "total epochs", type=positive_int, default=8)
    option("--batch-size", "images in a step, over all ranks together", type=positive_int, default=48)
    option("--learning-rate", "learning rate of AdamW", type=float, default=2e-3)
    option("--seed", "seed of the initial weights and of the order of images", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
