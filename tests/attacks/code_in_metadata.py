"""The pickle ``.metadata`` runs a command when it is read."""

from __future__ import annotations

from pathlib import Path

from tests.attacks.payload import Payload, edit_metadata, load_by_torch, save


def make(folder: Path, harm: Path) -> None:
    save(folder)
    edit_metadata(folder, lambda metadata: metadata.planner_data.update(weight=Payload(harm)))


def read_by_torch(folder: Path, harm: Path) -> None:  # noqa: ARG001  every attack has this signature
    load_by_torch(folder)
