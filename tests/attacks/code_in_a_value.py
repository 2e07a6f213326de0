"""The metadata is clean, but the stored bytes of a value that is not a tensor run a command."""

from __future__ import annotations

from pathlib import Path

from tests.attacks.payload import Payload, load_by_torch, save


def make(folder: Path, harm: Path) -> None:
    save(folder, ema=Payload(harm))


def read_by_torch(folder: Path, harm: Path) -> None:  # noqa: ARG001  every attack has this signature
    load_by_torch(folder, "ema")
