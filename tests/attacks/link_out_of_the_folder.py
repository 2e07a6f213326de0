"""A data file is a link to a file outside of the checkpoint's folder, whose contents would be exported."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from tests.attacks.payload import SECRET, load_by_torch, save, touch_if_secret


def make(folder: Path, harm: Path) -> None:  # noqa: ARG001  every attack has this signature
    save(folder)
    private = folder.parent / "private"
    dcp.save({"model": {"weight": torch.full((4, 3), SECRET)}}, checkpoint_id=private, no_dist=True)
    (data,) = folder.glob("*.distcp")
    data.unlink()
    data.symlink_to(private / data.name)


def read_by_torch(folder: Path, harm: Path) -> None:
    touch_if_secret(load_by_torch(folder), harm)
