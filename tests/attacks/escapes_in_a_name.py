"""A tensor's name holds escape sequences, which a terminal obeys: they change its title or hide text."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

ESCAPE = "\x1b]0;owned\x07"


def make(folder: Path, harm: Path) -> None:  # noqa: ARG001  every attack has this signature
    dcp.save({"model": {f"weight{ESCAPE}": torch.ones(4, 3)}}, checkpoint_id=folder, no_dist=True)


def read_by_torch(folder: Path, harm: Path) -> None:
    names = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    if ESCAPE in " ".join(names):  # a program that prints them
        harm.touch()
