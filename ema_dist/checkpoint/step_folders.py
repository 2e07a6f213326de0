"""The step folders in a root of checkpoints: each gets its final name only when its checkpoint is complete."""

from __future__ import annotations

import logging
import os
import re
import shutil
import warnings
from pathlib import Path

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.messages import log_visibly

_log = logging.getLogger(__name__)

REPLACED_SUFFIX = ".replaced"
"""Marks a complete checkpoint while a new save of the same step takes its name."""

STEP_NAME = re.compile(rf"step-(\d{{10,}})({re.escape(REPLACED_SUFFIX)})?")


def step_folder(root: Path, step: int) -> Path:
    """The folder of a complete checkpoint."""
    return root / f"step-{step:010}"


def complete_steps(root: Path) -> dict[int, Path]:
    """The complete checkpoints in ``root`` by step, oldest first."""
    steps: dict[int, Path] = {}
    for path in sorted(root.iterdir(), reverse=True) if root.is_dir() else ():
        if (match := STEP_NAME.fullmatch(path.name)) and path.is_dir():
            steps[int(match[1])] = path  # in reverse order, the name without a suffix comes last and wins
    return dict(sorted(steps.items()))


def create_partial_folder(root: Path, step: int) -> Path:
    """Create an empty folder for the checkpoint of a step, and remove what an earlier attempt left.

    Checkpoints of later steps belong to a run that was rolled back: they are set aside, with a warning.
    """
    final = step_folder(root, step)
    if final.exists() and not final.is_dir():
        raise CheckpointError(f"expected {final} to be a folder or not to exist: move or delete the file")
    partial = final.with_suffix(".partial")
    root.mkdir(parents=True, exist_ok=True)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    for other_step, folder in complete_steps(root).items():
        if other_step > step:
            _mark_superseded(folder, step)
    return partial


def commit(partial: Path, *, keep: int | None) -> None:
    """Give a finished checkpoint its name; remove all but the newest ``keep``, and leftovers of interrupted saves."""
    root, final = partial.parent, partial.with_suffix("")
    fsync(partial)  # before the rename: the name promises that everything is on disk
    if final.exists():
        _remove(_replaced_path(final))
        final.rename(_replaced_path(final))
    partial.rename(final)
    fsync(root)
    try:
        _remove(_replaced_path(final))
        complete = complete_steps(root)
        for old_step in list(complete)[: -keep if keep else 0]:
            _remove(complete.pop(old_step))
        _remove_leftovers(root, complete)
    except OSError as error:  # the save has succeeded: the checkpoint has its name
        message = f"{final.name} is saved, but old folders in {root} could not be removed: {error}"
        log_visibly(_log, logging.WARNING, message)


def locate(path: Path, step: int | None = None) -> Path:
    """Find the folder of a checkpoint: ``path`` itself, or the newest complete step (or ``step``) in that root.

    Raises: CheckpointError when there is no such checkpoint.
    """
    if (path / ".metadata").exists():
        if step is not None:
            raise CheckpointError(f"{path} is a single checkpoint, not a root of several: leave out the step")
        return path
    complete = complete_steps(path)
    if step is not None and step in complete:
        return complete[step]
    if complete and step is None:
        return complete[max(complete)]
    available = f"the complete steps {list(complete)}" if complete else "no complete checkpoint"
    raise CheckpointError(
        f"expected {'a checkpoint' if step is None else f'step {step}'} in {path}, found {available}"
        + ("" if path.exists() else "; there is no such folder")
    )


def _remove_leftovers(root: Path, complete: dict[int, Path]) -> None:
    """Remove the folders that interrupted saves left: unfinished, replaced or partly removed."""
    for leftover in [
        *root.glob("step-*.partial"),
        *root.glob("step-*.removed"),
        *root.glob(f"step-*{REPLACED_SUFFIX}"),
    ]:
        if leftover not in complete.values():
            shutil.rmtree(leftover)


def _replaced_path(final: Path) -> Path:
    return final.with_name(final.name + REPLACED_SUFFIX)


def _mark_superseded(folder: Path, step: int) -> None:
    candidates = (folder.with_suffix(f".superseded{number or ''}") for number in range(1000))
    superseded = next(path for path in candidates if not path.exists())
    folder.rename(superseded)
    warnings.warn(
        f"{folder} has a later step than the one being saved ({step}), so it comes from a run that was rolled back: it "
        f"was renamed to {superseded.name}; delete it when you do not need it",
        stacklevel=2,
    )


def _remove(folder: Path) -> None:
    """Rename a checkpoint, then remove it: a partly removed folder must not have the name of a complete one."""
    if folder.exists():
        renamed = folder.with_suffix(".removed")
        if renamed.exists():
            shutil.rmtree(renamed)
        folder.rename(renamed)
        shutil.rmtree(renamed)


def fsync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
