"""Folders that a run writes to, checked before its first step."""

import tempfile
import uuid
from pathlib import Path

import torch.distributed as dist

from .script import UsageError

METRICS, CURVES, RUN_ID = "metrics.csv", "curves.png", "run-id.txt"
RESULTS = (METRICS, CURVES, "*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json")
"""Patterns of the files that a run writes, and of files that would prevent it from writing them."""


def new_run_id() -> str:
    """A random identifier, the same on all ranks; checkpoints keep it for the resumed run. Collective: every rank."""
    run_id = [uuid.uuid4().hex]
    dist.broadcast_object_list(run_id)
    return run_id[0]


def claim_output_dir(folder: Path, run_id: str, *, option: str) -> None:
    """Write `run_id` to `folder`, where the first rank will write its results.

    Collective: every rank. Raises: UsageError on every rank if `folder` cannot be written to or holds results of
    another run; the message names the `option` that sets the folder.
    """
    problem = None
    if dist.get_rank() == 0 and not (problem := _create(folder, option)):
        file = folder / RUN_ID
        results = [path.name for pattern in RESULTS for path in folder.glob(pattern)]
        if results and not (file.exists() and file.read_text() == run_id):
            problem = f"{folder} holds results of another run ({', '.join(results)}); pass another {option}"
        else:
            file.write_text(run_id)
    _raise_on_all_ranks(problem)


def require_checkpoint_dir(folder: Path, *, option: str) -> None:
    """Create `folder`.

    Collective: every rank. Raises: UsageError on every rank if any rank cannot write to it, or if it is a checkpoint.
    """
    problem = _create(folder, option)
    if not problem and (folder / ".metadata").exists():
        problem = f"{folder} is one checkpoint, not a folder of several; pass {folder.parent}"
    _raise_on_all_ranks(problem)


def describe_checkpoint_dir(folder: Path | None) -> str:
    """Returns the text on checkpoints that a script prints before it trains."""
    return f"checkpoints in {folder}" if folder else "no checkpoints"


def _create(folder: Path, option: str) -> str | None:
    """Create the folder; returns an error message if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"cannot write to {folder}: {error.strerror}; pass another {option}"


def _raise_on_all_ranks(problem: str | None) -> None:
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if found := next(filter(None, problems), None):
        raise UsageError(found)
