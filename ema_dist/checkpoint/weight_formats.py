"""The formats of files of weights: how they are called, written and opened."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from ema_dist.checkpoint.errors import CheckpointError

FileFormat = Literal["safetensors", "torch"]

INDEX = ".index.json"


@dataclass(frozen=True)
class Opened:
    """The names in one file, and how to read one."""

    names: list[str]
    read: Callable[[str], Any]


@dataclass(frozen=True)
class Format:
    """How one format names its files, writes and opens them."""

    stem: str
    suffix: str
    suffixes: tuple[str, ...]
    """Of files that are read, whoever wrote them."""
    write: Callable[[Path, Mapping[str, Any]], None]
    open: Callable[[Path], Opened]

    @property
    def single(self) -> str:
        """The only file of an export that needs no more."""
        return self.stem + self.suffix

    @property
    def index(self) -> str:
        """The file that says which tensor is where, in an export of several."""
        return self.single + INDEX

    def files(self, folder: Path) -> list[Path]:
        """The files that an export in this format has left in a folder: what makes it readable comes first."""
        shard = re.compile(re.escape(self.stem) + r"-\d{5,}-of-\d{5,}" + re.escape(self.suffix))
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        entries = [path for path in paths if path.name in (self.index, self.single)]
        return entries + [path for path in paths if shard.fullmatch(path.name)]


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Not save_file: it refuses tied tensors, and older releases copy every tensor once more.
    specs = {
        name: TensorSpec(dtype=dtype_name(it), shape=it.shape, data_ptr=it.data_ptr(), data_len=it.nbytes)
        for name, it in tensors.items()
    }
    serialize_file(specs, path, metadata={"format": "pt"})


def holdable(value: Tensor) -> bool:
    """Whether a safetensors file can hold tensors of this dtype."""
    try:
        TensorSpec(dtype=dtype_name(value), shape=[0], data_ptr=0, data_len=0)
    except SafetensorError:
        return False
    return True


def _open_safetensors(path: Path) -> Opened:
    file = safe_open(path, framework="pt")
    return Opened(list(file.keys()), file.get_tensor)


def _write_torch(path: Path, entries: Mapping[str, Any]) -> None:
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            _require_loadable(name, value)
    torch.save(dict(entries), path)


def _open_torch(path: Path) -> Opened:
    entries = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(entries, Mapping) or not all(isinstance(name, str) for name in entries):
        raise CheckpointError(f"{path} holds a {type(entries).__name__}, expected a dictionary of tensors by name")
    return Opened(list(entries), entries.__getitem__)


FORMATS: dict[FileFormat, Format] = {
    "safetensors": Format("model", ".safetensors", (".safetensors",), _write_safetensors, _open_safetensors),
    "torch": Format("pytorch_model", ".bin", (".bin", ".pt", ".pth"), _write_torch, _open_torch),
}


def format_of(path: Path) -> Format:
    """By its suffix. Raises: CheckpointError for one that no format has."""
    for known in FORMATS.values():
        if path.suffix in known.suffixes:
            return known
    expected = [suffix for known in FORMATS.values() for suffix in known.suffixes]
    raise CheckpointError(f"{path} is no file of weights: expected a name that ends in one of {expected}")


def _require_loadable(name: str, value: Any) -> None:
    """Refuse an object that would make its file one that runs code when it is loaded."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{name!r} holds a {type(value).__name__}, which torch.load(weights_only=True) does not read back; "
            'file_format="safetensors" leaves it out'
        ) from error


def dtype_name(value: Tensor) -> str:
    """The dtype as safetensors spells it."""
    return str(value.dtype).removeprefix("torch.")
