"""Finds the checkpoint that a path refers to: a folder that DCP wrote, or one of the steps in a root."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ema_dist.checkpoint.dcp.metadata import METADATA_FILE
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.step_folders import complete_steps, locate
from ema_dist.checkpoint.weights.formats import FORMATS, entry_files
from ema_dist.messages import abbreviated

ANY_STEP_NAME = re.compile(r"(?!step-\d{10,}$)(.*?)(?<![.\d])(\d+)(?:\.ckpt)?")
"""The name of a step folder that another program wrote: it ends with the step, a whole number."""

INCOMPLETE_NAME = re.compile(r"step-\d{10,}\..*")
"""The name of a folder of `ema_dist.checkpoint` that is unfinished, superseded or removed."""


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """Return ``path`` if DCP wrote it, else the newest complete step, or ``step``, in that root.

    A step is a folder whose name ends with its number, such as step-6 or checkpoint-12, and that DCP wrote, or in which
    DCP wrote one folder.

    Raises: CheckpointError when there is no such checkpoint, or when several match.
    """
    steps: dict[int, list[Path]] = {} if _is_checkpoint(path) else find_steps(path)
    if not steps:
        nested = _checkpoints_in(path)
        if step is not None or not nested:
            _refuse_weights(path)
            return locate(path, step)
        return _only_one(path, nested)
    chosen = max(steps) if step is None else step
    if chosen not in steps:
        raise CheckpointError(f"expected step {chosen} in {path}, found the complete steps {sorted(steps)}")
    return _only_one(path, steps[chosen])


def has_checkpoint(path: Path) -> bool:
    """Whether the path is a checkpoint, or a folder that holds one or several."""
    return bool(_checkpoints_in(path) or find_steps(path))


def find_steps(root: Path) -> dict[int, list[Path]]:
    """The folders of each complete step in a root of checkpoints.

    Raises: CheckpointError when names differ in more than their last number, so that these may count different things.
    """
    steps = {step: [folder] for step, folder in complete_steps(root).items()}
    named: list[Path] = []
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        match = None if INCOMPLETE_NAME.fullmatch(path.name) else ANY_STEP_NAME.fullmatch(path.name)
        if match and (folders := _checkpoints_in(path)):
            steps.setdefault(int(match[2]), []).extend(folders)
            named.append(path)
    _require_same_prefix(root, named)
    return steps


def checkpoints_by_step(root: Path) -> list[tuple[int, Path]]:
    """The complete steps in a root of checkpoints and the folder of each, oldest first; empty if there are none.

    Raises: CheckpointError as `find_steps`, and when a step has several checkpoints.
    """
    return [(step, _only_one(root, folders)) for step, folders in sorted(find_steps(root).items())]


def _require_same_prefix(root: Path, folders: Iterable[Path]) -> None:
    """Raises: CheckpointError when the names of folders differ in more than their numbers."""
    names: dict[str, str] = {}
    for folder in folders:
        prefix = re.sub(r"\d+(\.ckpt)?$", "", folder.name)
        names.setdefault(re.sub(r"\d+", "#", prefix), folder.name)
    if len(names) > 1:
        raise CheckpointError(
            f"expected folders in {root} whose names differ only in the step, found {abbreviated(names.values())}: "
            "give the path of one of them"
        )


def expand_steps(path: Path) -> list[tuple[int | None, Path]]:
    """The steps in a root and their folders, oldest first; the path itself and the step in its name for anything else.

    A root may hold checkpoints, or folders of weight files whose names end with a step.

    Raises: CheckpointError as `find_steps`, when a step has several checkpoints, and when a root of checkpoints also
        has folders of weight files with a step in their name, or a root of such folders has others without one.
    """
    steps: dict[int, list[Path]] = {} if _is_checkpoint(path) else find_steps(path)
    folders = _weight_folders(path)
    numbered = [(step, folder) for folder in folders if (step := step_in_name(folder)) is not None]
    if steps and numbered:
        raise CheckpointError(
            f"{path} holds checkpoints, and weight files in {abbreviated(folder.name for _, folder in numbered)}: give "
            "the path of each source"
        )
    if numbered and len(numbered) < len(folders):
        others = [folder.name for folder in folders if step_in_name(folder) is None]
        raise CheckpointError(
            f"{path} holds folders of weight files with a step in their name ({numbered[0][1].name}), and others "
            f"without one ({abbreviated(others)}): give the path of each source"
        )
    _require_same_prefix(path, (folder for _, folder in numbered))
    for step, folder in numbered:
        steps.setdefault(step, []).append(folder)
    if not steps:
        return [(step_in_name(path), path)]
    return [(step, _only_one(path, folders)) for step, folders in sorted(steps.items())]


def step_in_name(path: Path) -> int | None:
    """The step that the name of a folder or file ends with, such as 6 of step-6; None if it ends otherwise.

    The number must follow a separator or a word such as step, so that bf16 and v2 do not count.
    """
    match = re.search(
        r"(?:^|[-_=]|step|epoch|iter|ep|ba)(\d+)$", path.name if path.is_dir() else path.stem, re.IGNORECASE
    )
    return int(match[1]) if match else None


def _weight_folders(root: Path) -> list[Path]:
    """The subfolders that hold weight files; none if ``root`` itself holds some or is a checkpoint."""
    if not root.is_dir() or _is_checkpoint(root) or entry_files(root):
        return []
    return [it for it in sorted(root.iterdir()) if it.is_dir() and not _checkpoints_in(it) and entry_files(it)]


def _checkpoints_in(path: Path) -> list[Path]:
    """The path itself if DCP wrote it, else the folders in it that DCP wrote."""
    if _is_checkpoint(path) or not path.is_dir():
        return [path] if _is_checkpoint(path) else []
    return [
        folder
        for folder in sorted(path.iterdir())
        if _is_checkpoint(folder) and not INCOMPLETE_NAME.fullmatch(folder.name)
    ]


def _is_checkpoint(path: Path) -> bool:
    return (path / METADATA_FILE).exists()


def _only_one(path: Path, folders: list[Path]) -> Path:
    if len(folders) > 1:
        names = ", ".join(str(folder.relative_to(path)) for folder in folders)
        raise CheckpointError(f"several checkpoints in {path} match: give the path of one of {names}")
    return folders[0]


def _refuse_weights(path: Path) -> None:
    """Raises: CheckpointError when the path is a file, or a folder that holds files, of weights or of Lightning."""
    suffixes = {".ckpt", *(suffix for file_format in FORMATS.values() for suffix in file_format.suffixes)}
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if names := [file.name for file in files if file.suffix in suffixes and file.is_file()]:
        raise CheckpointError(
            f"expected a folder that torch.distributed.checkpoint wrote at {path}, found the file "
            f"{abbreviated(names, limit=1)}; ema-dist diff compares full weights, and ema-dist import reads averages "
            "by other packages, also from files of Lightning"
        )
