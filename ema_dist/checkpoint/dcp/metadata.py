"""Reads the `.metadata` of a folder that DCP wrote, without running anything in it, and checks every value."""

from __future__ import annotations

import gc
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from ema_dist.checkpoint.dcp.entry_metadata import (
    EntryMetadata,
    UnexpectedError,
    parse_entry,
    raise_unexpected,
    require_count,
    require_size,
    require_type,
)
from ema_dist.checkpoint.dcp.unpickler import IndexRecord, ItemRecord, MetadataRecord, unpickle
from ema_dist.checkpoint.errors import CheckpointError

METADATA_FILE = ".metadata"
"""The file that DCP writes last."""


@dataclass(frozen=True)
class StoredItem:
    """The file and byte range of a chunk, or of a value that is not a tensor."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: tuple[str, ...] = ()


def read_metadata(folder: Path) -> Metadata:
    """Read and check the metadata of a folder that DCP wrote: names, shapes, dtypes, chunks, and their byte ranges.

    The chunks of each tensor cover it exactly once. Each has a `StoredItem` in `storage_data`, in a file that lies in
    the folder and is long enough. `planner_data` maps every name to its path, a tuple of str and int; the path is
    ``(name,)`` if DCP did not flatten; names are in the order of the dictionary that was saved. `storage_meta` (where
    and when the checkpoint was written) is left out.

    Memory: proportional to the file's size.
    Raises: CheckpointError when there is no `.metadata`, when it is damaged or holds anything that DCP does not write,
        or when a file that it names is missing or too short.
    """
    path = safe_join(folder, METADATA_FILE)
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: it has no {METADATA_FILE}, which DCP writes last"
        )
    try:
        with _gc_paused():
            return _parse_metadata(folder, require_type(MetadataRecord, unpickle(path.read_bytes()), "metadata"))
    except CheckpointError:
        raise
    except Exception as error:
        problem = str(error) if isinstance(error, UnexpectedError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is not what DCP writes: {problem}") from error


def safe_join(folder: Path, name: str) -> Path:
    """Return the path in ``folder`` of the file ``name``, which the checkpoint refers to.

    Raises: CheckpointError when ``name`` leads out of the folder, by itself or as a link.
    """
    plain = name not in {"", ".."} and "\0" not in name
    if not plain or PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
        raise CheckpointError(
            f"expected the plain name of a file in {folder}, found {reprlib.repr(name)} in the checkpoint"
        )
    path = folder / name
    try:
        leads_out = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, or a name that no file can have
        raise CheckpointError(f"{folder} refers to a file {reprlib.repr(name)}, which cannot exist: {error}") from None
    if leads_out:
        raise CheckpointError(
            f"{path} is a link that leads out of the checkpoint's folder: replace it with the file itself"
        )
    return path


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Pause garbage collection: parsing creates a million objects that stay alive, and collecting triples its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse_metadata(folder: Path, record: MetadataRecord) -> Metadata:
    fields = vars(record)
    stored = require_type(dict, fields.get("state_dict_metadata"), "state_dict_metadata")
    entries = {
        require_type(str, name, "name"): parse_entry(name, entry_record) for name, entry_record in stored.items()
    }
    items = _ItemParser(folder).parse(require_type(dict, fields.get("storage_data"), "storage_data"))
    for name, entry in entries.items():
        _require_items(name, entry, items)
    return Metadata(entries, planner_data=_parse_key_paths(fields.get("planner_data"), entries), storage_data=items)


class _ItemParser:
    """Turns the records of byte ranges into items, and checks that the files hold them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes: dict[str, int] = {}

    def parse(self, storage: dict[object, object]) -> dict[MetadataIndex, StoredItem]:
        items: dict[MetadataIndex, StoredItem] = {}
        for key, value in storage.items():
            fields = vars(require_type(IndexRecord, key, "key of storage_data"))
            name = require_type(str, fields.get("fqn"), "name in storage_data")
            offset = fields.get("offset")
            index = MetadataIndex(name, None if offset is None else require_size(offset, name))
            items[index] = self._parse_item(require_type(ItemRecord, value, "item", name), name)
        if len(items) < len(storage):
            raise_unexpected("two items of the same chunk")
        return items

    def _parse_item(self, record: ItemRecord, name: str) -> StoredItem:
        fields = vars(record)
        transforms = fields.get("transform_descriptors") or ()
        if transforms:
            transforms = tuple(
                [
                    require_type(str, transform, "transform", name)
                    for transform in require_type(list, transforms, "transforms", name)
                ]
            )
        item = StoredItem(
            require_type(str, fields.get("relative_path"), "file", name),
            require_count(fields.get("offset"), name),
            require_count(fields.get("length"), name),
            transforms,
        )
        end, size = item.offset + item.length, self._file_size(item.relative_path)
        if end > size:
            path = self._folder / item.relative_path
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes, but the entry {name!r} ends at byte {end}"
            )
        return item

    def _file_size(self, name: str) -> int:
        if name not in self._sizes:
            path = safe_join(self._folder, name)
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, but {METADATA_FILE} lists entries in it")
            self._sizes[name] = path.stat().st_size
        return self._sizes[name]


def _require_items(name: str, entry: EntryMetadata, items: Mapping[MetadataIndex, StoredItem]) -> None:
    if isinstance(entry, BytesStorageMetadata):
        if MetadataIndex(name) not in items:
            raise_unexpected("no item", name)
        return
    for chunk in entry.chunks:
        needed = prod(chunk.sizes) * entry.properties.dtype.itemsize
        item = items.get(MetadataIndex(name, chunk.offsets))
        if item is None and needed:
            raise_unexpected(f"no item for the chunk at {list(chunk.offsets)}", name)
        if item and not item.transform_descriptors and item.length < needed:
            raise_unexpected(f"an item of {item.length} bytes for a chunk of {needed} bytes", name)


def _parse_key_paths(value: object, entries: Mapping[str, EntryMetadata]) -> dict[str, tuple[str | int, ...]]:
    stored = {} if value is None else require_type(dict, value, "planner_data")
    # planner_data has the order of the dictionary that was saved.
    names = dict.fromkeys([name for name in stored if name in entries]) | dict.fromkeys(entries)
    paths: dict[str, tuple[str | int, ...]] = {name: (name,) for name in names}
    for name, path in stored.items():
        require_type(str, name, "name in planner_data")
        for part in require_type(tuple, path, "path", name):
            # DCP stores every item of a list. A larger index would make DCP build a list of any size.
            if type(part) is not str and require_count(part, name) >= len(stored):
                raise_unexpected(f"index {part} in a path", name)
        if not path or ".".join(map(str, path)) != name:
            raise_unexpected(f"{reprlib.repr(path)} as path", name)
        if name in paths:
            paths[name] = path
    return paths
