"""Trains the model of train.py with Lightning's Trainer, whose EMA callback is that of ema_dist.

    torchrun --nproc-per-node 2 launch/train_lightning.py                 # DDP, CPU or GPUs
    python launch/train_lightning.py --ranks 2 --parallel fsdp2           # Lightning's own launcher
    torchrun --nproc-per-node 2 launch/train_lightning.py --save-folder runs/lightning --resume

Needs Lightning: docs/lightning.md.
"""

import argparse
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from ema_dist.lightning import EMAWeightAveraging
from recipe.data import Images, load_images, shift_images
from recipe.model import VisionTransformer
from recipe.script import OptionParser, UsageError, positive_int, run_script


class Digits(pl.LightningModule):
    """Classifies digits with the vision transformer of train.py."""

    def __init__(self, *, is_sharded: bool, learning_rate: float) -> None:
        super().__init__()
        self.model = VisionTransformer()
        self.is_sharded = is_sharded
        self.learning_rate = learning_rate

    def configure_model(self) -> None:
        """Wrap the model in FSDP2, as ModelParallelStrategy expects."""
        if self.is_sharded:
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        pixels, labels = batch
        shifts = torch.randint(3, (len(pixels), 2))
        return F.cross_entropy(self.model(shift_images(pixels, shifts.to(pixels.device))), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        pixels, labels = batch
        logits = self.model(pixels)
        self.log("loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log("accuracy", (logits.argmax(dim=1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=0.05)


class Report(Callback):
    """Prints the step at which the run starts, and the scores of the averages after each epoch."""

    def on_train_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        trainer.print(f"starting at step {trainer.global_step}")

    def on_train_epoch_end(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        scores = trainer.callback_metrics
        trainer.print(
            f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}: "
            f"average loss {scores['loss']:.4f}, accuracy {scores['accuracy']:.2%}"
        )


def main() -> None:
    args = parse_arguments()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning|torch")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", args.ranks))
    if args.batch_size % ranks:
        raise UsageError(f"a batch of {args.batch_size} images cannot be divided among {ranks} ranks: pass a multiple")
    train(args, ranks)


def train(args: argparse.Namespace, ranks: int) -> None:
    """The recipe: data, model and average, in a Trainer."""
    training, test = load_images(torch.device("cpu"))
    pl.seed_everything(args.seed, verbose=False)
    callbacks: list[Callback] = [EMAWeightAveraging(decay=args.decay), Report()]
    if args.save_folder:
        callbacks.append(ModelCheckpoint(args.save_folder, filename="{epoch}", save_top_k=-1, save_last="link"))
    strategy = DDPStrategy() if args.parallel == "ddp" else ModelParallelStrategy(ranks, 1)
    trainer = pl.Trainer(
        accelerator=args.device,
        devices=ranks,
        strategy=strategy,
        callbacks=callbacks,
        max_epochs=args.epochs,
        logger=False,
        enable_checkpointing=args.save_folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    digits = Digits(is_sharded=args.parallel == "fsdp2", learning_rate=args.learning_rate)
    latest = args.save_folder / "last.ckpt" if args.resume else None
    trainer.fit(
        digits,
        batches(training, args.batch_size // ranks, shuffle=True),
        batches(test, len(test) // ranks, shuffle=False),
        ckpt_path=latest if latest and latest.exists() else None,
    )


def batches(images: Images, size: int, *, shuffle: bool) -> DataLoader[Any]:
    """Return a loader with batches of ``size`` on each rank; Lightning divides the images among the ranks."""
    return DataLoader(TensorDataset(images.pixels, images.labels), batch_size=size, shuffle=shuffle, drop_last=shuffle)


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(__doc__)
    option = parser.option
    option("--parallel", "how the model is parallelized", choices=["ddp", "fsdp2"], default="ddp")
    device = "gpu" if torch.cuda.is_available() else "cpu"
    option("--device", "gpu if there is one, by default", choices=["cpu", "gpu"], default=device)
    option("--ranks", "processes that Lightning starts; ignored under torchrun", type=positive_int, default=1)
    option("--decay", "factor of the old average at each step", type=float, default=0.98)
    option("--epochs", "total epochs, including those before --resume", type=positive_int, default=24)
    option("--batch-size", "images in a batch, over all ranks together", type=positive_int, default=48)
    option("--learning-rate", "learning rate of AdamW", type=float, default=2e-3)
    option("--seed", "seed of the initial weights and of the order of images", type=int, default=0)
    option("--save-folder", "folder for checkpoints, one after each epoch", type=Path)
    option("--resume", "continue from the newest checkpoint, if there is one", action="store_true")
    args = parser.parse_args()
    if args.resume and not args.save_folder:
        parser.error("--resume needs --save-folder")
    if args.save_folder and not args.resume and (args.save_folder / "last.ckpt").exists():
        parser.error(f"{args.save_folder} holds an earlier run: pass --resume to continue it, or another --save-folder")
    return args


if __name__ == "__main__":
    run_script(main)
