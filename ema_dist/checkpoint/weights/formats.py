"""The formats of weight files: their names, writers and readers."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize
from torch import Tensor

from ema_dist.checkpoint.dcp.archive import byte_view
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.values import require_loadable
from ema_dist.checkpoint.weights.torch_archive import can_be_mapped
from ema_dist.messages import abbreviated
from ema_dist.sharding import subclass_name

FileFormat = Literal["safetensors", "torch"]

INDEX_SUFFIX = ".index.json"
METADATA_KEY = "__metadata__"
"""The key of the entry in a safetensors header that is not a tensor."""

WRITER_MARK = {"written_by": "ema_dist"}
"""Marks the metadata of files and indices that this package wrote, so that a later export may replace them."""

COPIED_CHECKSUMS_KEY = "ema_dist_copied_files"
"""The metadata key of the checksums, as JSON, of the files that were copied beside the weights."""

SHARD_NUMBERS = r"-\d{5,}-of-\d{5,}"
"""Matches the part ``-00001-of-00003`` in the name of one of several files."""


@dataclass(frozen=True)
class OpenedFile:
    """The names in one file, a function that reads the value of a name, and the file's metadata."""

    names: list[str]
    read: Callable[[str], Any]
    metadata: Mapping[str, str] = field(default_factory=dict)


class FileWriter(Protocol):
    """Writes the entries of one file, and is closed after the last."""

    def add(self, name: str, value: Any) -> None:
        """Take one entry: a tensor on the CPU, or another value that the format can hold."""

    def close(self) -> None:
        """Finish the file."""


@dataclass(frozen=True)
class FormatSpec:
    """How one format names its files, writes and opens them."""

    stem: str
    suffix: str
    suffixes: tuple[str, ...]
    """The suffixes of files that are read in this format, including those that other programs write."""
    open_writer: Callable[[Path, Mapping[str, Any], Mapping[str, str]], FileWriter]
    """Starts a file, given its path, its planned entries and its metadata."""
    open: Callable[[Path], OpenedFile]
    keeps_non_tensors: bool
    """Whether files can hold values that are not tensors, and tensors of any dtype and name."""

    @property
    def single_file(self) -> str:
        """The file name of an export that consists of one file."""
        return self.stem + self.suffix

    @property
    def index_file(self) -> str:
        """The name of the index, in an export of several files: it maps each tensor to its file."""
        return self.single_file + INDEX_SUFFIX

    def named(self, name: str) -> FormatSpec:
        """The same format, with ``name`` for the file of an export that consists of one file.

        Raises: ValueError when it is not the plain name of such a file.
        """
        stem, suffix = Path(name).stem, Path(name).suffix
        is_plain = name == Path(name).name and "\\" not in name and "\0" not in name
        if not is_plain or suffix not in self.suffixes or re.search(SHARD_NUMBERS + "$", stem):
            raise ValueError(
                f"expected the name of one file that ends in {' or '.join(self.suffixes)}, such as "
                f"{self.single_file}, got {name!r}"
            )
        return replace(self, stem=stem, suffix=suffix)

    def files(self, folder: Path) -> list[Path]:
        """The files of an export in this format in a folder; the index or the single file comes first."""
        shard = re.compile(re.escape(self.stem) + SHARD_NUMBERS + re.escape(self.suffix))
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        entry_files = [path for path in paths if path.name in (self.index_file, self.single_file)]
        return entry_files + [path for path in paths if shard.fullmatch(path.name)]


class SafetensorsFileWriter:
    """Writes the header first, then the bytes of each added tensor; safetensors' own writers need all tensors at once.

    Memory: nothing beyond the tensor being written.
    """

    def __init__(self, path: Path, planned: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {METADATA_KEY: {"format": "pt", **metadata}}
        end = 0
        # The widest dtype first aligns every tensor to its item size, as readers that map the file into memory need.
        for name, tensor in sorted(planned.items(), key=lambda item: -item[1].itemsize):
            start, end = end, end + tensor.nbytes
            self._offsets[name] = start
            header[name] = {
                "dtype": _header_dtype(tensor.dtype),
                "shape": [*tensor.shape],
                "data_offsets": [start, end],
            }
        header_bytes = json.dumps(header).encode()
        header_bytes += b" " * (-len(header_bytes) % 8)
        self._path = path
        self._data_offset = path.write_bytes(len(header_bytes).to_bytes(8, "little") + header_bytes)

    def add(self, name: str, value: Tensor) -> None:
        """Write the bytes of one tensor at its offset."""
        contiguous = value.contiguous()
        if not contiguous.nbytes:
            return
        remaining = byte_view(contiguous)
        with self._path.open("r+b", buffering=0) as file:
            file.seek(self._data_offset + self._offsets[name])
            while remaining:
                remaining = remaining[file.write(remaining) :]

    def close(self) -> None:
        """Check that safetensors can open the file."""
        _open_safetensors(self._path)


@cache
def _header_dtype(dtype: torch.dtype) -> str:
    """The dtype as it is spelled in safetensors headers."""
    empty = TensorSpec(dtype=dtype_name(torch.empty(0, dtype=dtype)), shape=[0], data_ptr=0, data_len=0)
    header: dict[str, Any] = json.loads(serialize({"tensor": empty})[8:])
    return str(header["tensor"]["dtype"])


def unsupported_reason(name: str, value: Tensor) -> str:
    """Why a safetensors file cannot hold this tensor (its type, dtype or name); empty if it can."""
    if subclass := subclass_name(value):
        return subclass
    try:
        TensorSpec(dtype=dtype_name(value), shape=[0], data_ptr=0, data_len=0)
        name.encode()
    except SafetensorError:
        return dtype_name(value)
    except UnicodeEncodeError:
        return "a name that is not valid Unicode"
    return "a name that the format reserves" if name == METADATA_KEY else ""


def _open_safetensors(path: Path) -> OpenedFile:
    file = safe_open(path, framework="pt")
    return OpenedFile(file.offset_keys(), file.get_tensor, file.metadata() or {})


class TorchFileWriter:
    """Collects all entries and writes them with ``torch.save`` when it is closed.

    Memory: the tensors of the file.
    """

    def __init__(self, path: Path, _planned: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        self._path = path
        # torch pickles the attributes of an OrderedDict too; those of a module's state_dict() are in `_metadata`.
        self._entries: OrderedDict[str, Any] = OrderedDict()
        self._entries.__dict__["metadata"] = dict(metadata)

    def add(self, name: str, value: Any) -> None:
        """Collect an entry, which must not change until `close`."""
        if isinstance(value, Tensor):
            contiguous = value.contiguous()
            value = contiguous.clone() if contiguous.untyped_storage().nbytes() > contiguous.nbytes else contiguous
        else:
            require_loadable(
                value,
                f"{name!r} holds a {type(value).__name__}, which torch.load(weights_only=True) cannot read; "
                'file_format="safetensors" leaves such values out',
            )
        self._entries[name] = value

    def close(self) -> None:
        """Write the file.

        Raises: OSError when it cannot be written.
        """
        try:
            torch.save(self._entries, self._path)
        except RuntimeError as error:  # torch reports a full disk like this
            raise OSError(f"cannot write {self._path}: {error}") from error


def _open_torch(path: Path) -> OpenedFile:
    entries = torch.load(path, map_location="cpu", mmap=can_be_mapped(path), weights_only=True)
    if not isinstance(entries, Mapping) or not all(isinstance(name, str) for name in entries):
        found = f"a {type(entries).__name__}"
        if isinstance(entries, Mapping):
            found = f"the keys {abbreviated(repr(key) for key in entries if not isinstance(key, str))}"
        raise CheckpointError(f"expected a dictionary of tensors by name in {path}, found {found}")
    metadata = getattr(entries, "metadata", {})
    return OpenedFile(list(entries), entries.__getitem__, metadata if isinstance(metadata, Mapping) else {})


FORMATS: dict[FileFormat, FormatSpec] = {
    "safetensors": FormatSpec(
        "model",
        ".safetensors",
        (".safetensors",),
        SafetensorsFileWriter,
        _open_safetensors,
        keeps_non_tensors=False,
    ),
    "torch": FormatSpec(
        "pytorch_model",
        ".bin",
        (".bin", ".pt", ".pth"),
        TorchFileWriter,
        _open_torch,
        keeps_non_tensors=True,
    ),
}


def own_metadata(path: Path) -> Mapping[str, Any] | None:
    """The metadata of a file of weights or an index that this package wrote; None for others and unreadable ones."""
    try:
        if path.name.endswith(INDEX_SUFFIX):
            metadata = json.loads(path.read_bytes())["metadata"]
        else:
            metadata = detect_format(path).open(path).metadata
        return metadata if WRITER_MARK.items() <= metadata.items() else None
    except Exception:  # noqa: BLE001  parsers raise all kinds of errors
        return None


def entry_files(folder: Path) -> list[Path]:
    """The index or the single file of each export in a folder, of any name and format."""
    suffixes = (INDEX_SUFFIX, *(suffix for file_format in FORMATS.values() for suffix in file_format.suffixes))
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name.endswith(suffixes) and not re.search(SHARD_NUMBERS + "$", path.stem)
    ]


def detect_format(path: Path) -> FormatSpec:
    """The format of a file, by its suffix. Raises: CheckpointError for a suffix of no format."""
    for file_format in FORMATS.values():
        if path.suffix in file_format.suffixes:
            return file_format
    expected = [suffix for file_format in FORMATS.values() for suffix in file_format.suffixes]
    raise CheckpointError(f"expected a file name that ends in one of {expected}, got {path}")


def dtype_name(value: Tensor) -> str:
    """The dtype as it is spelled by ``TensorSpec``, for example ``float32``."""
    return str(value.dtype).removeprefix("torch.")
