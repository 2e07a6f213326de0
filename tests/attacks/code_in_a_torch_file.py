"""A ``pytorch_model.bin`` with a value that runs a command."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.attacks.payload import Payload


def make(folder: Path, harm: Path) -> None:
    folder.mkdir()
    torch.save({"weight": torch.ones(4, 3), "more": Payload(harm)}, folder / "pytorch_model.bin")


def read_by_torch(folder: Path, harm: Path) -> None:  # noqa: ARG001  every attack has this signature
    torch.load(folder / "pytorch_model.bin", weights_only=False)
