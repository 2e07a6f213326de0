"""Trains the digits of train.py with Composer's Trainer: one import gives it averages that are sharded like the model.

    torchrun --nproc-per-node 2 launch/train_composer.py                  # DDP, CPU or GPUs
    composer -n 2 launch/train_composer.py --parallel fsdp2               # Composer's own launcher
    python launch/train_composer.py                                       # one process
    torchrun --nproc-per-node 2 launch/train_composer.py --save-folder runs/composer --resume

Needs Composer, in an environment of its own: docs/composer.md.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from composer import Callback, DataSpec, Evaluator, Trainer
from composer.core import State
from composer.loggers import Logger
from composer.models import ComposerClassifier
from composer.optim import ConstantWithWarmupScheduler
from composer.utils import dist
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from ema_dist.composer import EMA
from recipe.data import Images, load_images, shift_images
from recipe.evaluation import Scores
from recipe.model import Block, VisionTransformer

AVERAGE_LABEL, LIVE_LABEL = "eval", "eval-live"
LATEST_CHECKPOINT = "latest-rank0.pt"  # as Composer calls it, monolithic or sharded
PARALLELISM_CONFIGS: dict[str, dict[str, Any] | None] = {
    "ddp": None,
    "fsdp1": {"fsdp": {"sharding_strategy": "FULL_SHARD", "state_dict_type": "sharded"}},
    "fsdp2": {"fsdp": {"state_dict_type": "sharded"}},
}


class LiveEvaluation(Callback):
    """Evaluates the live weights in the evaluator ``eval-live``, the averages in all others, and prints both scores."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema

    def eval_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002  Composer's signature
        if state.dataloader_label == LIVE_LABEL and self.ema.ema_weights_active:
            self.ema.get_training_model(state.model)

    def eval_after_all(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        live, average = scores(state, LIVE_LABEL), scores(state, AVERAGE_LABEL)
        if dist.get_global_rank() == 0:
            epoch, batch = state.timestamp.epoch.value, state.timestamp.batch.value
            line_break = "\n" if sys.stderr.isatty() else ""  # Composer leaves the cursor on its line
            print(f"{line_break}epoch {epoch}, batch {batch}: live {live}; average {average}", flush=True)


def scores(state: State, label: str) -> Scores:
    """The metrics that the Trainer has just logged. Collective: every rank."""
    metrics = state.eval_metrics[label]
    return Scores(metrics["CrossEntropy"].compute().item(), metrics["MulticlassAccuracy"].compute().item())


def main() -> None:
    args = parse_arguments()
    os.environ.setdefault("NODE_RANK", os.environ.get("GROUP_RANK", "0"))  # Composer needs it; torchrun sets GROUP_RANK
    os.environ["FSDP_VERSION"] = "2" if args.parallel == "fsdp2" else "1"
    dist.initialize_dist(args.device)
    train(args)


def train(args: argparse.Namespace) -> None:
    """The recipe: data, model, optimizer and average, in a Trainer."""
    training, test = load_images(torch.device("cpu"))
    torch.manual_seed(args.seed)
    model = ComposerClassifier(VisionTransformer(), num_classes=10, loss_fn=F.cross_entropy)
    model.module.fsdp_wrap_fn = is_block
    ema = EMA(half_life=f"{args.half_life}ba")
    trainer = Trainer(
        model=model,
        algorithms=[ema],
        callbacks=[LiveEvaluation(ema)],
        train_dataloader=training_batches(training, args),
        eval_dataloader=[
            Evaluator(label=label, dataloader=test_batches(test)) for label in (AVERAGE_LABEL, LIVE_LABEL)
        ],
        optimizers=AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05),
        schedulers=ConstantWithWarmupScheduler(t_warmup="1ep"),
        max_duration=f"{args.epochs}ep",
        eval_interval="1ep",
        parallelism_config=PARALLELISM_CONFIGS[args.parallel],
        device=args.device,
        precision="fp32",
        seed=args.seed,
        run_name="digits",
        save_folder=str(args.save_folder) if args.save_folder else None,
        save_interval="1ep",
        autoresume=args.resume,
        # Composer saves the progress bar, and a sharded checkpoint with one loads only into a Trainer that has one too:
        # so there is always one, without a terminal it writes to the null device.
        console_stream=sys.stderr if sys.stderr.isatty() else Path(os.devnull).open("w"),  # noqa: SIM115
    )
    if dist.get_global_rank() == 0:
        print(f"starting at batch {trainer.state.timestamp.batch.value}", flush=True)
    if trainer.state.timestamp.epoch.value < args.epochs:  # else Composer raises
        trainer.fit()
    trainer.close()


def is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


def training_batches(images: Images, args: argparse.Namespace) -> DataSpec:
    """This rank's part of each batch; shuffled anew in each epoch, each image randomly shifted."""
    ranks = dist.get_world_size()
    if args.batch_size % ranks:
        raise ValueError(f"a batch of {args.batch_size} images does not divide over {ranks} ranks: see --batch-size")
    data = TensorDataset(images.pixels, images.labels)
    sampler = dist.get_sampler(data, shuffle=True, drop_last=True, seed=args.seed)
    loader = DataLoader(data, batch_size=args.batch_size // ranks, sampler=sampler, drop_last=True)
    return DataSpec(loader, batch_transforms=augment)


def augment(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    pixels, labels = batch
    return shift_images(pixels, torch.randint(3, (len(pixels), 2))), labels


def test_batches(images: Images) -> DataLoader[Any]:
    """This rank's part of the images, in one batch."""
    data = TensorDataset(images.pixels, images.labels)
    sampler = dist.get_sampler(data)
    return DataLoader(data, batch_size=len(sampler), sampler=sampler)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--parallel", choices=PARALLELISM_CONFIGS, default="ddp")
    option("--device", choices=["cpu", "gpu"], default="gpu" if torch.cuda.is_available() else "cpu")
    option("--half-life", type=int, default=60, metavar="BATCHES", help="of the average")
    option("--epochs", type=int, default=24)
    option("--batch-size", type=int, default=48, help="images in a batch, over all ranks together")
    option("--learning-rate", type=float, default=2e-3)
    option("--seed", type=int, default=0)
    option("--save-folder", type=Path, help="write a checkpoint here after each epoch")
    option("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    args = parser.parse_args()
    if args.resume and not args.save_folder:
        parser.error("--resume needs --save-folder")
    if args.save_folder and not args.resume and os.path.lexists(args.save_folder / LATEST_CHECKPOINT):
        parser.error(f"{args.save_folder} is of an earlier run: pass --resume to continue it or another --save-folder")
    if args.parallel == "fsdp1" and args.device == "cpu":
        parser.error("--parallel fsdp1 needs a GPU: Composer asks CUDA for one when it wraps; pass --parallel fsdp2")
    return args


if __name__ == "__main__":
    main()
