"""The index of sharded safetensors names a file outside of the folder, whose contents would be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.attacks.payload import SECRET, touch_if_secret

INDEX = "model.safetensors.index.json"


def make(folder: Path, harm: Path) -> None:  # noqa: ARG001  every attack has this signature
    folder.mkdir()
    private = folder.parent / "private.safetensors"
    save_file({"weight": torch.full((4, 3), SECRET)}, private)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"weight": "../private.safetensors"}}))


def read_by_torch(folder: Path, harm: Path) -> None:
    """What a reader does that follows the index; torch itself has none."""
    (name,) = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    touch_if_secret(load_file(folder / name)["weight"], harm)
