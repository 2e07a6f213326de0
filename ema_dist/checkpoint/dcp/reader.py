"""DCP's reader and load planner without what would run code from a checkpoint, and a load in two agreed phases."""

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

from ema_dist.checkpoint.agreement import by_rank, together
from ema_dist.checkpoint.dcp.archive import Window, data_start, lies_plainly, memory_of
from ema_dist.checkpoint.dcp.metadata import Item, inside, read_metadata
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.messages import few
from ema_dist.sharding import is_cut

T = TypeVar("T")

ZIP = b"PK\x03\x04"
"""How a file begins that `torch.save` wrote; older formats go through older code, and DCP never used them."""

SMALL_BYTES = 4 * 2**20
"""Up to so many are read at once: torch.load makes many small reads, which through a view of a file are slow."""


def read(
    folder: Path, *wanted: dict[str, Any], metadata: Metadata | None = None, group: ProcessGroup | None = None
) -> None:
    """Fill each of ``wanted``: entries of a checkpoint by their DCP names, without running anything that it holds.

    Args:
        wanted: tensors (plain, DTensor or ShardedTensor) are read into in place, resharded, cast to their dtype;
            anything else is replaced by the value stored, a tensor on the CPU or what a byte entry holds.
        metadata: of this folder, when it has been read already.
        group: the ranks that read together; None for this process alone, whether or not there is a process group.

    Collective: over ``group``, where a problem of one rank is an error on all.
    Memory: one chunk of the checkpoint at a time, beside what is wanted.
    Raises: CheckpointError, before anything is read, when names are missing or shapes differ, naming them all, or when
        the metadata is damaged; and when an entry is: then tensors read before it have their new values already.
    """
    reader = Reader(folder, metadata=metadata)
    plans = _agreed(lambda: [_plan(reader, of_one) for of_one in wanted], group)
    _agreed(lambda: [reader.read_data(plan, planner).wait() for plan, planner in plans], group)
    for of_one, (_, planner) in zip(wanted, plans, strict=True):
        of_one.update(planner.state_dict)


class Reader(FileSystemReader):
    """Reads a folder that DCP wrote; nothing in it can make it run code or open a file elsewhere.

    Memory: one chunk at a time.
    Raises: CheckpointError for a checkpoint that is damaged, naming the file and the entry; also `read_metadata`.
    """

    def __init__(self, folder: Path, *, metadata: Metadata | None = None) -> None:
        super().__init__(folder)
        self._folder = folder
        self._metadata = metadata

    def read_metadata(self, *_: object, **kwargs: object) -> Metadata:
        if kwargs.get("rank") is not None:  # torch asks so once there is none for all ranks
            raise CheckpointError(f"{self._folder} has metadata of single ranks only; expected one .metadata")
        if self._metadata is None:
            self._metadata = read_metadata(self._folder)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert isinstance(planner, Planner), "only ours reads byte entries safely"
        for name, requests in self._by_file(plan).items():
            path = inside(self._folder, name)
            with path.open("rb") as file:
                for item, same in requests:
                    self._read_item(path, file, item, same, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _by_file(self, plan: LoadPlan) -> dict[str, list[tuple[Item, list[ReadItem]]]]:
        """What to read from each file, in the order in which it lies there, everything once."""
        requests: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
        for request in plan.items:
            if request.type == LoadItemType.BYTE_IO or 0 not in request.lengths:
                requests[request.storage_index].append(request)
        by_file: dict[str, list[tuple[Item, list[ReadItem]]]] = defaultdict(list)
        for index in sorted(requests, key=lambda index: self.storage_data[index].offset):
            item = self.storage_data[index]
            by_file[item.relative_path].append((item, requests[index]))
        return by_file

    def _read_item(self, path: Path, file: IO[bytes], item: Item, requests: list[ReadItem], planner: Planner) -> None:
        index = requests[0].storage_index
        try:
            stream = self._stream(file, item, requests[0])
            if requests[0].type == LoadItemType.BYTE_IO:
                planner.load_bytes(requests[0], io.BytesIO(stream.read(item.length)))
                return
            piece = self._piece(stream, index)
            for request in requests:
                if not (isinstance(piece, LoadedPiece) and planner.adopts(request, piece.tensor)):
                    piece.copy(request, planner.target(request))
        except Exception as error:
            place = f"bytes {item.offset} to {item.offset + item.length}"
            raise CheckpointError(f"{path}: the entry {index.fqn!r}, {place}, cannot be read: {error}") from error

    def _stream(self, file: IO[bytes], item: Item, request: ReadItem) -> IO[bytes]:
        if item.length <= SMALL_BYTES and not item.transform_descriptors:
            file.seek(item.offset)
            return io.BytesIO(file.read(item.length))
        stream: Any = Window(file, item.offset, item.length)
        if not item.transform_descriptors:
            return stream
        if not hasattr(self, "transforms"):
            raise CheckpointError(f"it is stored through {item.transform_descriptors}, which needs torch 2.7 or later")
        return io.BytesIO(self.transforms.transform_load_stream(request, item.transform_descriptors, stream).read(-1))

    def _piece(self, stream: IO[bytes], index: MetadataIndex) -> LoadedPiece | StoredPiece:
        entry = self.read_metadata().state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        assert index.index is not None
        size, dtype = entry.chunks[index.index].sizes, entry.properties.dtype
        start = data_start(stream, dtype, size)
        if start is not None:
            return StoredPiece(stream, start, dtype, size)
        stream.seek(0)
        found = unpack(stream)
        if (
            type(found) is not Tensor
            or (found.shape, found.dtype, found.layout) != (size, dtype, torch.strided)
            or found.device.type != "cpu"
        ):
            stored = type(found).__name__
            if isinstance(found, Tensor):
                stored = f"{found.dtype} {list(found.shape)}, {found.layout} on {found.device}"
            raise CheckpointError(f"expected {dtype} {list(size)} as the metadata says, found {stored}")
        return LoadedPiece(found)


@dataclass(frozen=True)
class LoadedPiece:
    """A stored piece of a tensor that `torch.load` had to read."""

    tensor: Tensor

    def copy(self, request: ReadItem, target: Tensor) -> None:
        """Copy the part that is asked for to where it belongs."""
        part = self.tensor
        for dim, (start, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        target.copy_(part)


@dataclass(frozen=True)
class StoredPiece:
    """A stored piece of a tensor whose elements begin at ``start``: only the rows that are asked for are read."""

    stream: Any
    start: int
    dtype: torch.dtype
    shape: torch.Size

    def copy(self, request: ReadItem, target: Tensor) -> None:
        """Read the part that is asked for to where it belongs: straight to there, where it lies in the same order."""
        whole_rows = request.lengths[1:] == self.shape[1:]
        if whole_rows and target.dtype == self.dtype and lies_plainly(target):
            self._read_rows(request, target)
            increment_version(target)  # a graph that saved the tensor must notice
            return
        rows = torch.empty((*request.lengths[:1], *self.shape[1:]), dtype=self.dtype, device="cpu")
        self._read_rows(request, rows)
        for dim, (start, length) in enumerate(zip(request.storage_offsets[1:], request.lengths[1:], strict=True), 1):
            rows = rows.narrow(dim, start, length)
        target.copy_(rows)

    def _read_rows(self, request: ReadItem, rows: Tensor) -> None:
        first = request.storage_offsets[0] if self.shape else 0
        self.stream.seek(self.start + first * self.shape[1:].numel() * self.dtype.itemsize)
        left = memory_of(rows)
        while left:
            count = self.stream.readinto(left)
            if not count:
                raise CheckpointError(f"it ends {len(left)} bytes too early")
            left = left[count:]


class Planner(DefaultLoadPlanner):
    """Plans the reading of a flat dict; byte entries are read without running what they hold.

    Raises: CheckpointError for a byte entry that is damaged or holds more than torch reads safely.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(  # not as torch does it, which would give memory to tensors on the meta device
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,  # noqa: FBT001, FBT002  torch's signature
    ) -> None:
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = unpack(value)

    def adopts(self, read_item: ReadItem, tensor: Tensor) -> bool:
        """Whether a tensor that was read becomes the entry itself: it is all of one that was on the meta device."""
        name = read_item.dest_index.fqn
        target = self.state_dict[name]
        if is_cut(target) or not target.is_meta or not target.shape == read_item.lengths == tensor.shape:
            return False
        self.state_dict[name] = tensor
        return True

    def target(self, read_item: ReadItem) -> Tensor:
        """Where what was read belongs; instead of a tensor on the meta device, a real one."""
        name = read_item.dest_index.fqn
        tensor = self.state_dict[name]
        if not is_cut(tensor) and tensor.is_meta:
            self.state_dict[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return self.resolve_tensor(read_item).detach()


def unpack(stream: IO[bytes]) -> Any:
    """What `torch.save` wrote, tensors on the CPU: plain values, and classes admitted by `add_safe_globals`, no others.

    Raises: CheckpointError when it holds anything else, naming it; and whatever damaged bytes make `torch.load` raise.
    """
    if stream.read(len(ZIP)) != ZIP:
        raise CheckpointError("expected an archive as torch.save writes it, found something else")
    stream.seek(0)
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        stream.seek(0)
        if not (refused := get_unsafe_globals_in_checkpoint(stream)):
            raise
        names = ", ".join(sorted(refused))
        raise CheckpointError(
            f"it holds {names}, which torch does not read unless told to, as it could run code; if you trust "
            f"the checkpoint, admit it: torch.serialization.add_safe_globals([{names}])"
        ) from error


def _plan(reader: Reader, wanted: dict[str, Any]) -> tuple[LoadPlan, Planner]:
    metadata = reader.read_metadata()
    stored = metadata.state_dict_metadata
    if missing := wanted.keys() - stored:
        raise CheckpointError(
            f"{reader.path} has no entries {few(sorted(missing))}; expected them among its {len(stored)}"
        )
    problems = {name: _misfit(value, stored[name]) for name, value in wanted.items()}
    if wrong := [f"{name!r} {problem}" for name, problem in problems.items() if problem]:
        raise CheckpointError(f"{reader.path} does not fit: {few(wrong, between='; ')}")
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    planner = Planner()
    planner.set_up_planner({name: _target(value, stored[name]) for name, value in wanted.items()}, metadata)
    return planner.finish_plan(planner.create_local_plan()), planner


def _misfit(value: object, entry: TensorStorageMetadata | BytesStorageMetadata) -> str:
    if not isinstance(value, Tensor):
        return ""
    if isinstance(entry, BytesStorageMetadata):
        return f"is a tensor of shape {list(value.size())} here, and not a tensor there"
    if value.size() != entry.size:
        return f"has shape {list(value.size())} here, and {list(entry.size)} there"
    return "is on the meta device here; materialise it first" if not is_cut(value) and value.is_meta else ""


def _target(value: object, entry: TensorStorageMetadata | BytesStorageMetadata) -> Tensor | None:
    """What to read into; None, or a tensor on the meta device, for what will be replaced."""
    if isinstance(entry, BytesStorageMetadata):
        return None
    if isinstance(value, Tensor):
        return value
    device = "meta" if entry.size.numel() else "cpu"  # nothing is read that would replace an empty one
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=device)


def _agreed(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """What ``work`` returns, once it has returned on every rank of ``group``.

    Raises: CheckpointError when it has raised one, or OSError, anywhere; what else it raises here, and CheckpointError
        on the other ranks.
    """
    try:
        result = work()
    except (CheckpointError, OSError) as error:
        raise CheckpointError("; ".join(together([by_rank(str(error), group)], group))) from error
    except Exception as error:
        together([by_rank(f"{type(error).__name__}: {error}", group)], group)
        raise
    if problems := together([], group):
        raise CheckpointError("; ".join(problems))
    return result
