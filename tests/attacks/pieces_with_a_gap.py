"""The pieces of a tensor leave rows out: a reader that allocates without clearing exports memory of its process."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from tests.attacks.payload import SECRET, edit_metadata, save, touch_if_secret


def make(folder: Path, harm: Path) -> None:  # noqa: ARG001  every attack has this signature
    save(folder)

    def leave_out_the_last_row(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["model.weight"]
        entry.chunks[:] = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3, 3]))]
        (item,) = metadata.storage_data.values()
        metadata.storage_data = {MetadataIndex("model.weight", torch.Size([0, 0])): item}

    edit_metadata(folder, leave_out_the_last_row)


def read_by_torch(folder: Path, harm: Path) -> None:
    weight = torch.full((4, 3), SECRET)  # stands for what the memory held before
    dcp.load({"model": {"weight": weight}}, checkpoint_id=folder, no_dist=True)
    touch_if_secret(weight, harm)
