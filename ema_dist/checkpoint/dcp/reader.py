"""DCP's reader and load planner, changed to run no code from a checkpoint, and a load in two phases.

Every rank finishes the first phase, planning, before any rank starts the second one, reading.
"""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future
from torch.serialization import get_unsafe_globals_in_checkpoint

from ema_dist.checkpoint.agreement import gather_problems, prefix_rank
from ema_dist.checkpoint.dcp.archive import FileSlice, byte_view, data_offset, is_contiguous_cpu
from ema_dist.checkpoint.dcp.metadata import StoredItem, read_metadata, safe_join
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.messages import abbreviated
from ema_dist.sharding import is_sharded

T = TypeVar("T")

ZIP_MAGIC = b"PK\x03\x04"
"""The first bytes of a file by `torch.save`. DCP never used torch's older formats."""

MAX_BUFFERED_BYTES = 4 * 2**20
"""Items up to this size are read at once: torch.load makes many small reads, which are slow in a `FileSlice`."""


def read_entries(
    folder: Path, *state_dicts: dict[str, Any], metadata: Metadata | None = None, group: ProcessGroup | None = None
) -> None:
    """Read entries of a checkpoint into dictionaries of DCP names, without running anything in the checkpoint.

    Args:
        state_dicts: tensors in them (plain, DTensor or ShardedTensor) are read into in place, resharded, and cast to
            their dtype; any other value is replaced by the stored one, tensors on the CPU.
        metadata: the folder's metadata, if it has been read already.
        group: the ranks that read together; None for this process alone, whether or not there is a process group.

    Collective: over ``group``; a problem on one rank is an error on all.
    Memory: one chunk of the checkpoint at a time, in addition to the values read.
    Raises: CheckpointError, before anything is read, when the metadata is damaged, or names are missing or shapes
        differ (all are named); and when an entry is damaged: tensors read before it then have their new values.
    """
    reader = SafeReader(folder, metadata=metadata)
    with torch.device("cpu"):  # DTensor computes offsets in tensors on the default device, which may be "meta"
        plans = _run_collectively(lambda: [_plan(reader, state_dict) for state_dict in state_dicts], group)
        _run_collectively(lambda: [reader.read_data(plan, planner).wait() for plan, planner in plans], group)
    for state_dict, (_, planner) in zip(state_dicts, plans, strict=True):
        state_dict.update(planner.state_dict)


def read_plain_values(folder: Path) -> dict[str, Any]:
    """All entries of a checkpoint that are not tensors, by DCP name.

    Collective: no. Raises: CheckpointError when one of them cannot be read.
    """
    metadata = read_metadata(folder)
    stored = metadata.state_dict_metadata
    values: dict[str, Any] = {n: None for n, entry in stored.items() if isinstance(entry, BytesStorageMetadata)}
    read_entries(folder, values, metadata=metadata)
    return values


class SafeReader(FileSystemReader):
    """Reads a folder that DCP wrote; nothing in the folder can make it run code or open a file elsewhere.

    Memory: one chunk at a time.
    Raises: CheckpointError for a damaged checkpoint, naming the file and the entry, from `read_metadata` too.
    """

    def __init__(self, folder: Path, *, metadata: Metadata | None = None) -> None:
        super().__init__(folder)
        self._folder = folder
        self._metadata = metadata

    def read_metadata(self, *_: object, **kwargs: object) -> Metadata:
        if kwargs.get("rank") is not None:  # torch asks for these when there is no common .metadata
            raise CheckpointError(f"expected one .metadata in {self._folder}, found metadata of single ranks only")
        if self._metadata is None:
            self._metadata = read_metadata(self._folder)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert isinstance(planner, SafeLoadPlanner), "only SafeLoadPlanner reads byte entries safely"
        for name, requests in self._group_by_file(plan).items():
            path = safe_join(self._folder, name)
            with path.open("rb") as file:
                for item, item_requests in requests:
                    self._read_item(path, file, item, item_requests, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _group_by_file(self, plan: LoadPlan) -> dict[str, list[tuple[StoredItem, list[ReadItem]]]]:
        """The requests for each file and item, in the order of the file, so that every item is read once."""
        requests: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
        for request in plan.items:
            if request.type == LoadItemType.BYTE_IO or 0 not in request.lengths:
                requests[request.storage_index].append(request)
        by_file: dict[str, list[tuple[StoredItem, list[ReadItem]]]] = defaultdict(list)
        for index in sorted(requests, key=lambda index: self.storage_data[index].offset):
            item = self.storage_data[index]
            by_file[item.relative_path].append((item, requests[index]))
        return by_file

    def _read_item(
        self, path: Path, file: IO[bytes], item: StoredItem, requests: list[ReadItem], planner: SafeLoadPlanner
    ) -> None:
        index = requests[0].storage_index
        try:
            stream = self._open_stream(file, item, requests[0])
            if requests[0].type == LoadItemType.BYTE_IO:
                planner.load_bytes(requests[0], io.BytesIO(stream.read(item.length)))
                return
            chunk = self._open_chunk(stream, index)
            for request in requests:
                if not (isinstance(chunk, LoadedChunk) and planner.try_adopt(request, chunk.tensor)):
                    chunk.read_into(request, planner.target(request))
        except Exception as error:
            byte_range = f"bytes {item.offset} to {item.offset + item.length}"
            raise CheckpointError(f"{path}: the entry {index.fqn!r}, {byte_range}, cannot be read: {error}") from error

    def _open_stream(self, file: IO[bytes], item: StoredItem, request: ReadItem) -> IO[bytes]:
        if item.length <= MAX_BUFFERED_BYTES and not item.transform_descriptors:
            file.seek(item.offset)
            return io.BytesIO(file.read(item.length))
        stream: Any = FileSlice(file, item.offset, item.length)
        if not item.transform_descriptors:
            return stream
        if not hasattr(self, "transforms"):  # FileSystemReader's, since torch 2.7
            raise CheckpointError(
                f"it is stored with the transforms {item.transform_descriptors}, which need torch 2.7 or later"
            )
        return io.BytesIO(self.transforms.transform_load_stream(request, item.transform_descriptors, stream).read(-1))

    def _open_chunk(self, stream: IO[bytes], index: MetadataIndex) -> LoadedChunk | StoredChunk:
        entry = self.read_metadata().state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        assert index.index is not None
        size, dtype = entry.chunks[index.index].sizes, entry.properties.dtype
        start = data_offset(stream, dtype, size)
        if start is not None:
            return StoredChunk(stream, start, dtype, size)
        stream.seek(0)
        loaded = safe_torch_load(stream)
        if (
            type(loaded) is not Tensor
            or (loaded.shape, loaded.dtype, loaded.layout) != (size, dtype, torch.strided)
            or loaded.device.type != "cpu"
        ):
            stored = type(loaded).__name__
            if isinstance(loaded, Tensor):
                stored = f"{loaded.dtype} {list(loaded.shape)}, {loaded.layout} on {loaded.device}"
            raise CheckpointError(f"expected {dtype} {list(size)} as the metadata says, found {stored}")
        return LoadedChunk(loaded)


@dataclass(frozen=True)
class LoadedChunk:
    """A chunk of a tensor that `torch.load` had to read."""

    tensor: Tensor

    def read_into(self, request: ReadItem, target: Tensor) -> None:
        """Copy the requested part into ``target``."""
        part = self.tensor
        for dim, (start, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        target.copy_(part)


@dataclass(frozen=True)
class StoredChunk:
    """A chunk of a tensor whose elements begin at ``start`` of the stream: only the requested rows are read."""

    stream: Any
    start: int
    dtype: torch.dtype
    shape: torch.Size

    def read_into(self, request: ReadItem, target: Tensor) -> None:
        """Read the requested part into ``target``, without a copy if it is stored in the same order."""
        whole_rows = request.lengths[1:] == self.shape[1:]
        if whole_rows and target.dtype == self.dtype and is_contiguous_cpu(target):
            self._read_rows(request, target)
            increment_version(target)  # byte_view bypasses autograd, and a graph that saved the tensor must notice
            return
        rows = torch.empty((*request.lengths[:1], *self.shape[1:]), dtype=self.dtype, device="cpu")
        self._read_rows(request, rows)
        for dim, (start, length) in enumerate(zip(request.storage_offsets[1:], request.lengths[1:], strict=True), 1):
            rows = rows.narrow(dim, start, length)
        target.copy_(rows)

    def _read_rows(self, request: ReadItem, rows: Tensor) -> None:
        first = request.storage_offsets[0] if self.shape else 0
        self.stream.seek(self.start + first * self.shape[1:].numel() * self.dtype.itemsize)
        remaining = byte_view(rows)
        while remaining:
            count = self.stream.readinto(remaining)
            if not count:
                raise CheckpointError(f"the file ends {len(remaining)} bytes too early")
            remaining = remaining[count:]


class SafeLoadPlanner(DefaultLoadPlanner):
    """Plans the reading of a flat dictionary; byte entries are read without running code in them.

    Raises: CheckpointError for a byte entry that is damaged or holds objects that torch does not read safely.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(  # not torch's, which would allocate tensors on the meta device
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,  # noqa: FBT001, FBT002  torch's signature
    ) -> None:
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = safe_torch_load(value)

    def try_adopt(self, read_item: ReadItem, tensor: Tensor) -> bool:
        """Make ``tensor`` the entry if it is all of an entry on the meta device; return whether it is."""
        name = read_item.dest_index.fqn
        target = self.state_dict[name]
        if is_sharded(target) or not target.is_meta or not target.shape == read_item.lengths == tensor.shape:
            return False
        self.state_dict[name] = tensor
        return True

    def target(self, read_item: ReadItem) -> Tensor:
        """The tensor to read into; an entry on the meta device is allocated first."""
        name = read_item.dest_index.fqn
        tensor = self.state_dict[name]
        if not is_sharded(tensor) and tensor.is_meta:
            self.state_dict[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return self.resolve_tensor(read_item).detach()


def safe_torch_load(stream: IO[bytes]) -> Any:
    """Load a file by `torch.save`, tensors on the CPU: only plain values and classes allowed by `add_safe_globals`.

    Raises: CheckpointError that names any other class; and whatever damaged bytes make `torch.load` raise.
    """
    if stream.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
        raise CheckpointError("expected an archive written by torch.save, found other bytes")
    stream.seek(0)
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        stream.seek(0)
        if not (refused := get_unsafe_globals_in_checkpoint(stream)):
            raise
        names = ", ".join(sorted(refused))
        raise CheckpointError(
            f"it holds {names}, which torch does not load by default, because it could run code; if you trust "
            f"the checkpoint, allow it: torch.serialization.add_safe_globals([{names}])"
        ) from error


def _plan(reader: SafeReader, state_dict: dict[str, Any]) -> tuple[LoadPlan, SafeLoadPlanner]:
    metadata = reader.read_metadata()
    stored = metadata.state_dict_metadata
    if missing := state_dict.keys() - stored:
        raise CheckpointError(f"{reader.path} has {len(stored)} entries, but lacks {abbreviated(sorted(missing))}")
    problems = {name: _describe_mismatch(value, stored[name]) for name, value in state_dict.items()}
    if mismatches := [f"{name!r} {problem}" for name, problem in problems.items() if problem]:
        raise CheckpointError(
            f"{reader.path} does not match the values to read into: {abbreviated(mismatches, separator='; ')}"
        )
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    planner = SafeLoadPlanner()
    planner.set_up_planner({name: _target(value, stored[name]) for name, value in state_dict.items()}, metadata)
    return planner.finish_plan(planner.create_local_plan()), planner


def _describe_mismatch(value: object, entry: TensorStorageMetadata | BytesStorageMetadata) -> str:
    if not isinstance(value, Tensor):
        return ""
    if isinstance(entry, BytesStorageMetadata):
        return f"is a tensor of shape {list(value.size())}, but the checkpoint holds no tensor"
    if value.size() != entry.size:
        return f"has shape {list(value.size())}, but {list(entry.size)} in the checkpoint"
    return "is on the meta device: materialize it first" if not is_sharded(value) and value.is_meta else ""


def _target(value: object, entry: TensorStorageMetadata | BytesStorageMetadata) -> Tensor | None:
    """The tensor to read into; a tensor on the meta device, or None for bytes, if the value will be replaced."""
    if isinstance(entry, BytesStorageMetadata):
        return None
    if isinstance(value, Tensor):
        return value
    # An empty tensor is not read, so nothing would replace it if it were on the meta device.
    device = "meta" if entry.size.numel() else "cpu"
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=device)


def _run_collectively(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """Call ``work`` and return its result, once it has returned on every rank of ``group``.

    Collective: over ``group``.
    Raises: CheckpointError on every rank when ``work`` raised CheckpointError or OSError on any; another exception on
        the rank that raised it, and CheckpointError on the others.
    """
    try:
        result = work()
    except (CheckpointError, OSError) as error:
        raise CheckpointError("; ".join(gather_problems([prefix_rank(str(error), group)], group))) from error
    except Exception as error:
        gather_problems([prefix_rank(f"{type(error).__name__}: {error}", group)], group)
        raise
    if problems := gather_problems([], group):
        raise CheckpointError("; ".join(problems))
    return result
