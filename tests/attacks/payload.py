"""What the attacks are made of."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

SECRET = 4242.0
"""What a file outside of the checkpoint's folder holds: a reader that returns it was led there."""


class Payload:
    """Creates a file when it is unpickled; a real one would run any command."""

    def __init__(self, harm: Path) -> None:
        self._harm = harm

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self._harm}'",)


def save(folder: Path, **extra: object) -> None:
    """Save a checkpoint of live weights, averages of them, and ``extra``."""
    state = {"model": {"weight": torch.ones(4, 3)}, **extra}
    dcp.save(state, checkpoint_id=folder, no_dist=True)


def edit_metadata(folder: Path, change: Callable[[Metadata], object]) -> None:
    """Rewrite ``.metadata`` after ``change``."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata, protocol=4))


def load_by_torch(folder: Path, *names: str) -> torch.Tensor:
    """The weight of the model as `dcp.load` reads it, together with the entries ``names``."""
    weight = torch.zeros(4, 3)
    dcp.load({"model": {"weight": weight}, **dict.fromkeys(names)}, checkpoint_id=folder, no_dist=True)
    return weight


def touch_if_secret(weight: torch.Tensor, harm: Path) -> None:
    """Create ``harm`` if the weight was read from the file outside of the checkpoint's folder."""
    if (weight == SECRET).any():
        harm.touch()
