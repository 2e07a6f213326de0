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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from traceback import walk_tb
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
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from ema_dist.composer import EMA
from recipe.checkpoints import require_same_settings, saved_settings
from recipe.data import Images, load_images, shift_images
from recipe.evaluation import Scores
from recipe.folders import describe_checkpoint_dir, require_checkpoint_dir
from recipe.model import Block, VisionTransformer
from recipe.parallelism import describe_run, require_gpu
from recipe.script import OptionParser, ScriptError, UsageError, positive_int, print_rank_0, run_script

AVERAGE_LABEL, LIVE_LABEL = "eval", "eval-live"
LATEST_CHECKPOINT = "latest-rank0.pt"  # as Composer calls it, monolithic or sharded
LOADING_MODULE = "composer.utils.checkpoint"  # all loading of checkpoints passes through it
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
        epoch, batch = state.timestamp.epoch.value, state.timestamp.batch.value
        line_break = "\n" if sys.stderr.isatty() else ""  # Composer's progress bar leaves the cursor on its line
        print_rank_0(f"{line_break}epoch {epoch}, batch {batch}: live {live}; average {average}")


class SettingsCheck(Callback):
    """Saves settings in each checkpoint, and refuses to resume with different ones."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.is_checked = False

    def state_dict(self) -> dict[str, Any]:
        return dict(self.settings)  # Composer loads sharded checkpoints into what this returns

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_same_settings(self.settings, state, "the checkpoint")
        self.is_checked = True

    def require_checked(self) -> None:
        """Raise a UsageError if Composer found no settings in the checkpoint: Composer itself only warns."""
        if not self.is_checked:
            require_same_settings(self.settings, {}, "the checkpoint")


@contextmanager
def loading_errors_as_script_errors(folder: Path | None) -> Iterator[None]:
    """Turn exceptions that Composer raises while it loads a checkpoint from `folder` into a ScriptError."""
    try:
        yield
    except (EOFError, KeyError, OSError, RuntimeError, ValueError, UnpicklingError, CheckpointException) as error:
        modules = {frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)}
        if folder is None or LOADING_MODULE not in modules or isinstance(error, ScriptError):
            raise
        # In a CheckpointException, all lines before the last one are tracebacks.
        reason = (str(error).strip() or "no reason given").splitlines()[-1]
        raise ScriptError(
            f"cannot resume from {folder / LATEST_CHECKPOINT} ({type(error).__name__}: {reason}): the checkpoint may "
            "be damaged, saved with another --parallel, or written by an older version of this script. Make "
            f"{LATEST_CHECKPOINT} a link to an older checkpoint, or start in another folder"
        ) from error


def scores(state: State, label: str) -> Scores:
    """The metrics that the Trainer has just logged. Collective: every rank."""
    metrics = state.eval_metrics[label]
    return Scores(metrics["CrossEntropy"].compute().item(), metrics["MulticlassAccuracy"].compute().item())


def main() -> None:
    args = parse_arguments()
    os.environ.setdefault("NODE_RANK", os.environ.get("GROUP_RANK", "0"))  # Composer needs it; torchrun sets GROUP_RANK
    os.environ["FSDP_VERSION"] = "2" if args.parallel == "fsdp2" else "1"
    if args.device == "gpu":
        require_gpu()
    dist.initialize_dist(args.device)
    train(args)


def train(args: argparse.Namespace) -> None:
    """The recipe: data, model, optimizer and average, in a Trainer."""
    if args.save_folder:
        require_checkpoint_dir(args.save_folder, option="--save-folder")
    training, test = load_images(torch.device("cpu"))
    torch.manual_seed(args.seed)
    model = ComposerClassifier(VisionTransformer(), num_classes=10, loss_fn=F.cross_entropy)
    model.module.fsdp_wrap_fn = is_block
    ema = EMA(half_life=f"{args.half_life}ba")
    print_rank_0(describe_run(args.parallel, args.device, model, ema))
    print_rank_0(describe_checkpoint_dir(args.save_folder))
    settings_check = SettingsCheck(saved_settings(training, args))
    with loading_errors_as_script_errors(args.save_folder):
        trainer = make_trainer(args, model, ema, settings_check, (training, test))
    if trainer.state.timestamp.batch.value:
        settings_check.require_checked()
    print_rank_0(f"starting at batch {trainer.state.timestamp.batch.value}")
    if trainer.state.timestamp.epoch.value < args.epochs:  # else Composer raises
        trainer.fit()
    trainer.close()


def make_trainer(
    args: argparse.Namespace,
    model: ComposerClassifier,
    ema: EMA,
    settings_check: SettingsCheck,
    data: tuple[Images, Images],
) -> Trainer:
    """The Trainer; with --resume, it has loaded the newest checkpoint."""
    training, test = data
    return Trainer(
        model=model,
        algorithms=[ema],
        callbacks=[LiveEvaluation(ema), settings_check],
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
        # Composer saves the progress bar's state, and a sharded checkpoint that has it loads only into a Trainer with a
        # progress bar. So there always is one; without a terminal, it writes to the null device.
        console_stream=sys.stderr if sys.stderr.isatty() else Path(os.devnull).open("w"),
    )


def is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


def training_batches(images: Images, args: argparse.Namespace) -> DataSpec:
    """This rank's part of each batch; shuffled anew in each epoch, each image randomly shifted."""
    ranks = dist.get_world_size()
    if args.batch_size % ranks:
        raise UsageError(f"expected a --batch-size divisible by the {ranks} ranks, found {args.batch_size}")
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
    parser = OptionParser(__doc__)
    option = parser.option
    option("--parallel", "how the model is sharded", choices=PARALLELISM_CONFIGS, default="ddp")
    device = "gpu" if torch.cuda.is_available() else "cpu"
    option("--device", "the default is gpu if there is one", choices=["cpu", "gpu"], default=device)
    option("--half-life", "half-life of the average, in batches", type=positive_int, default=60, metavar="BATCHES")
    option("--epochs", "total epochs, including those before --resume", type=positive_int, default=24)
    option("--batch-size", "images in a batch, over all ranks together", type=positive_int, default=48)
    option("--learning-rate", "peak learning rate of AdamW, reached after one epoch", type=float, default=2e-3)
    option("--seed", "seed of the initial weights and of the order of images", type=int, default=0)
    option("--save-folder", "folder for checkpoints, one after each epoch", type=Path)
    option("--resume", "continue from the newest checkpoint, if there is one", action="store_true")
    args = parser.parse_args()
    if args.resume and not args.save_folder:
        parser.error("--resume needs --save-folder")
    if args.save_folder and not args.resume and os.path.lexists(args.save_folder / LATEST_CHECKPOINT):
        parser.error(
            f"{args.save_folder} belongs to an earlier run: pass --resume to continue it, or another --save-folder"
        )
    if args.parallel == "fsdp1" and args.device == "cpu":
        parser.error("--parallel fsdp1 needs a GPU: Composer asks CUDA for one when it wraps; pass --parallel fsdp2")
    return args


if __name__ == "__main__":
    run_script(main)
