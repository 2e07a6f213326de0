"""Averages of torch's ``AveragedModel`` beside a value that runs a command."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.attacks.payload import Payload


def make(folder: Path, harm: Path) -> None:
    folder.mkdir()
    content = {"ema": {"n_averaged": torch.tensor(1), "module.weight": torch.ones(4, 3)}, "args": Payload(harm)}
    torch.save(content, folder / "averages.pt")


def read_by_torch(folder: Path, harm: Path) -> None:  # noqa: ARG001  every attack has this signature
    torch.load(folder / "averages.pt", weights_only=False)
