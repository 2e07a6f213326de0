"""What is in a folder that DCP wrote, read from its `.metadata` without running anything, and checked throughout."""

from __future__ import annotations

import gc
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from ema_dist.checkpoint.dcp.tensor_entries import Entry, UnexpectedError, entry, exactly, natural, size_of, unexpected
from ema_dist.checkpoint.dcp.unpickler import IndexRecord, ItemRecord, MetadataRecord, unpickle
from ema_dist.checkpoint.errors import CheckpointError

METADATA = ".metadata"
"""The file that DCP writes last."""


@dataclass(frozen=True)
class Item:
    """Where the bytes of a chunk, or of a value that is no tensor, lie."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: tuple[str, ...] = ()


def read_metadata(folder: Path) -> Metadata:
    """What a folder that DCP wrote holds: names, shapes, dtypes, chunks, and where they lie.

    The chunks of each tensor cover it exactly once; each has an `Item` in `storage_data`, in a file that lies in the
    folder and is long enough; `planner_data` maps every name to its path, a tuple of str and int, ``(name,)`` where DCP
    was told not to flatten. `storage_meta`, the story of the checkpoint, is left out.

    Memory: proportional to the file's size.
    Raises: CheckpointError when there is no such file, when it is damaged, when anything in it is not what DCP writes,
        or when the files of the folder are not those it speaks of.
    """
    path = inside(folder, METADATA)
    if not path.is_file():
        raise CheckpointError(f"{folder} is no complete checkpoint: it has no {METADATA}, which DCP writes last")
    try:
        with _collector_paused():
            return _metadata(folder, exactly(MetadataRecord, unpickle(path.read_bytes()), "metadata"))
    except CheckpointError:
        raise
    except Exception as error:
        found = str(error) if isinstance(error, UnexpectedError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is not what DCP writes: {found}") from error


def inside(folder: Path, name: str) -> Path:
    """The path of the file ``name`` in a folder, when it lies there and nowhere else.

    Raises: CheckpointError when ``name``, which a checkpoint chose, leads out of the folder, by itself or as a link.
    """
    plain = name not in {"", ".."} and "\0" not in name
    if not plain or PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
        raise CheckpointError(
            f"{folder} speaks of a file {reprlib.repr(name)}; expected the plain name of a file in it"
        )
    path = folder / name
    try:
        leads_out = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, or a name that no file can have
        raise CheckpointError(f"{folder} speaks of a file {reprlib.repr(name)}, which cannot be: {error}") from None
    if leads_out:
        raise CheckpointError(f"{path} is a link out of the checkpoint's folder; put the file itself there")
    return path


@contextmanager
def _collector_paused() -> Iterator[None]:
    """For a hundred thousand chunks, a million new objects and no garbage: looking for it would triple the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _metadata(folder: Path, record: MetadataRecord) -> Metadata:
    fields = vars(record)
    stored = exactly(dict, fields.get("state_dict_metadata"), "state_dict_metadata")
    entries = {exactly(str, name, "name"): entry(name, found) for name, found in stored.items()}
    items = _Items(folder).of(exactly(dict, fields.get("storage_data"), "storage_data"))
    for name, described in entries.items():
        _require_items(name, described, items)
    return Metadata(entries, planner_data=_paths(fields.get("planner_data"), entries), storage_data=items)


class _Items:
    """Turns the records of where things lie into items that do lie there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes: dict[str, int] = {}

    def of(self, storage: dict[object, object]) -> dict[MetadataIndex, Item]:
        items: dict[MetadataIndex, Item] = {}
        for key, value in storage.items():
            fields = vars(exactly(IndexRecord, key, "key of storage_data"))
            name = exactly(str, fields.get("fqn"), "name in storage_data")
            offset = fields.get("offset")
            index = MetadataIndex(name, None if offset is None else size_of(offset, name))
            items[index] = self._item(exactly(ItemRecord, value, "item", name), name)
        if len(items) < len(storage):
            unexpected("two items of the same chunk")
        return items

    def _item(self, record: ItemRecord, name: str) -> Item:
        fields = vars(record)
        transforms = fields.get("transform_descriptors") or ()
        if transforms:
            transforms = tuple(
                [exactly(str, it, "transform", name) for it in exactly(list, transforms, "transforms", name)]
            )
        item = Item(
            exactly(str, fields.get("relative_path"), "file", name),
            natural(fields.get("offset"), name),
            natural(fields.get("length"), name),
            transforms,
        )
        end, size = item.offset + item.length, self._file_size(item.relative_path)
        if end > size:
            path = self._folder / item.relative_path
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes, and the entry {name!r} ends at byte {end}"
            )
        return item

    def _file_size(self, name: str) -> int:
        if name not in self._sizes:
            path = inside(self._folder, name)
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; {METADATA} says that entries are stored in it")
            self._sizes[name] = path.stat().st_size
        return self._sizes[name]


def _require_items(name: str, described: Entry, items: Mapping[MetadataIndex, Item]) -> None:
    if isinstance(described, BytesStorageMetadata):
        if MetadataIndex(name) not in items:
            unexpected("no item", name)
        return
    for chunk in described.chunks:
        needed = prod(chunk.sizes) * described.properties.dtype.itemsize
        item = items.get(MetadataIndex(name, chunk.offsets))
        if item is None and needed:
            unexpected(f"no item for the chunk at {list(chunk.offsets)}", name)
        if item and not item.transform_descriptors and item.length < needed:
            unexpected(f"an item of {item.length} bytes for a chunk of {needed} bytes", name)


def _paths(found: object, entries: Mapping[str, Entry]) -> dict[str, tuple[str | int, ...]]:
    paths: dict[str, tuple[str | int, ...]] = {name: (name,) for name in entries}
    given = {} if found is None else exactly(dict, found, "planner_data")
    for name, path in given.items():
        exactly(str, name, "name in planner_data")
        for part in exactly(tuple, path, "path", name):
            # Lists are stored whole: an index beyond all names would only make a list of the file's choice.
            if type(part) is not str and natural(part, name) >= len(given):
                unexpected(f"index {part} in a path", name)
        if not path or ".".join(map(str, path)) != name:
            unexpected(f"{reprlib.repr(path)} as path", name)
        if name in paths:
            paths[name] = path
    return paths
