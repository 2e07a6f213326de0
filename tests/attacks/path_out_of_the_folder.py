"""The metadata names a data file outside of the checkpoint's folder, whose contents would be exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from tests.attacks.payload import SECRET, edit_metadata, load_by_torch, save, touch_if_secret


def make(folder: Path, harm: Path) -> None:  # noqa: ARG001  every attack has this signature
    save(folder)
    private = folder.parent / "private"
    dcp.save({"model": {"weight": torch.full((4, 3), SECRET)}}, checkpoint_id=private, no_dist=True)

    def lead_outside(metadata: Metadata) -> None:
        metadata.storage_data = {
            index: replace(item, relative_path=f"../private/{item.relative_path}")
            for index, item in metadata.storage_data.items()
        }

    edit_metadata(folder, lead_outside)


def read_by_torch(folder: Path, harm: Path) -> None:
    touch_if_secret(load_by_torch(folder), harm)
