"""Checkpoints of a training run: saving, and resuming from the newest one."""

import argparse
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from ema_dist import ShardedEMA, checkpoint
from ema_dist.communication.rendezvous import RendezvousError

from .data import Images
from .folders import require_checkpoint_dir
from .metrics import EpochMetrics
from .script import ScriptError, UsageError


@dataclass
class TrainingProgress:
    """The run's identifier, its learning rate schedule and the metrics of finished epochs: a DCP `Stateful`."""

    run_id: str
    lr_scheduler: LRScheduler
    rows: list[EpochMetrics] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        rows = [asdict(row) for row in self.rows]
        return {"run_id": self.run_id, "schedule": self.lr_scheduler.state_dict(), "rows": rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.run_id = state_dict["run_id"]
        self.lr_scheduler.load_state_dict(state_dict["schedule"])
        self.rows = [EpochMetrics(**row) for row in state_dict["rows"]]


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of `state` in the folder `root`; without a folder, nothing is saved or loaded.

    `settings` are saved too, and a run with different ones cannot resume.
    """

    root: Path | None
    state: MutableMapping[str, Any]
    settings: Mapping[str, Any]

    def resume(self, *, is_requested: bool) -> str:
        """Load the newest intact checkpoint, if there is one; returns a message that says where the run starts.

        Collective: every rank. Raises: UsageError if `root` cannot be written, if there is a checkpoint and
        `is_requested` is false, or if the checkpoint has other settings or another model; ScriptError if a rank does
        not arrive; CheckpointError if all checkpoints are damaged.
        """
        if self.root:
            require_checkpoint_dir(self.root, option="--checkpoint-dir")
        newest_step = checkpoint.latest(self.root) if self.root else None
        if self.root is None or newest_step is None:
            return "starting from the beginning" + (f": no checkpoint in {self.root}" if is_requested else "")
        if not is_requested:
            raise UsageError(
                f"step {newest_step} in {self.root} is from an earlier run: pass --resume to continue it or another "
                "--checkpoint-dir"
            )
        contents: dict[str, Any] = {**self.state, "settings": {}}
        try:
            step = checkpoint.load(contents, self.root)
        except RendezvousError as error:
            _raise_unless_mismatch(error)
            require_same_settings(self.settings, *_load_settings(self.root))
            raise UsageError(f"the checkpoint in {self.root} does not fit this run: {error}") from error
        require_same_settings(self.settings, contents["settings"], f"step {step} in {self.root}")
        return f"continuing from step {step} in {self.root}"

    def save(self, step: int, *, block: bool) -> None:
        """Save, in the background unless `block`. Collective: every rank. A failure of the previous save is ignored."""
        if self.root:
            with suppress(checkpoint.CheckpointError):  # logged when it failed; this save is the next attempt
                checkpoint.wait()
            checkpoint.save({**self.state, "settings": dict(self.settings)}, self.root, step=step, block=block)


def resume_or_start(checkpoints: Checkpoints, ema: ShardedEMA, *, resume: bool, start_from: Path | None) -> str:
    """Resume from the newest checkpoint; if there is none, start from the weights in `start_from`.

    Returns a message that says where the run starts. Collective: every rank. Raises: as `Checkpoints.resume`, and
    UsageError if the weights do not fit the model.
    """
    message = checkpoints.resume(is_requested=resume)
    return _start_from(start_from, ema) if start_from and not ema.steps else message


def _start_from(folder: Path, ema: ShardedEMA) -> str:
    """Replace live weights and averages with those in a DCP checkpoint or in weight files, on every layout."""
    try:
        if (folder / ".metadata").exists():
            checkpoint.load({"model": ema.model}, folder)
        else:
            checkpoint.scatter(ema, folder)
            ema.copy_to(ema.model)
    except RuntimeError as error:  # includes RendezvousError and CheckpointError
        raise UsageError(f"--start-from {folder} does not fit this model: {error}") from error
    ema.reset()
    return f"starting from the weights in {folder}"


def saved_settings(training: Images, args: argparse.Namespace) -> dict[str, Any]:
    """The settings, by option, that a resumed run must share with the run that saved the checkpoint."""
    return {
        "--batch-size": args.batch_size,
        "--seed": args.seed,
        "--learning-rate": args.learning_rate,
        "data set (SHA-256)": training.sha256(),
    }


def require_same_settings(expected: Mapping[str, Any], found: Mapping[str, Any], checkpoint_name: str) -> None:
    """Raise a UsageError that names the settings that a checkpoint lacks, or that differ from those saved in it."""
    if missing := [name for name in expected if name not in found]:
        raise UsageError(
            f"{checkpoint_name} holds no {', '.join(missing)} to compare with this run: an older version of this "
            "script or another program wrote it. Continue with the program that wrote it, or start anew in another "
            "folder"
        )
    if different := [name for name, value in expected.items() if found[name] != value]:
        differences = "; ".join(f"{name} {found[name]}, and this run has {expected[name]}" for name in different)
        raise UsageError(
            f"{checkpoint_name} was saved with {differences}: resume with the same options and data, or start anew in "
            "another folder"
        )


def _load_settings(root: Path) -> tuple[dict[str, Any], str]:
    """The settings in the newest intact checkpoint, empty if it has none, and a name for it in messages."""
    contents: dict[str, Any] = {"settings": {}}
    try:
        step = checkpoint.load(contents, root)
    except RendezvousError as error:
        _raise_unless_mismatch(error)
        return {}, f"the checkpoint in {root}"  # it has no such entry
    return contents["settings"], f"step {step} in {root}"


def _raise_unless_mismatch(error: RendezvousError) -> None:
    """Raise a ScriptError if ranks did not arrive, but not if `checkpoint.load` found that names or shapes differ."""
    if not error.same_call:
        raise ScriptError(str(error)) from error


@contextmanager
def checkpoint_errors_as_script_errors() -> Iterator[None]:
    """Raise a CheckpointError as a ScriptError: its message says all that a user needs."""
    try:
        yield
    except checkpoint.CheckpointError as error:
        raise ScriptError(str(error)) from error
