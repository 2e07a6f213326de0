"""A DCP writer that hashes the files it writes, and gives the checkpoint its name once it is complete and readable."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ema_dist.checkpoint.dcp.reader import read_plain_values
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.manifest import FileRecord, Manifest
from ema_dist.checkpoint.planner import SavePlanner
from ema_dist.messages import abbreviated


class CheckpointWriter(FileSystemWriter):
    """Writes the files of one checkpoint into ``partial``; the first rank adds the manifest and commits.

    Args:
        manifest: without its files.
        planner: the planner of this save; it has the metadata on the first rank.
        commit: called on the first rank with ``partial`` when it is complete.
    """

    def __init__(
        self, partial: Path, manifest: Manifest, planner: SavePlanner, *, commit: Callable[[Path], object]
    ) -> None:
        super().__init__(partial)
        self._file_system = HashingFileSystem()
        self.fs: FileSystem = self._file_system  # torch opens every file through this attribute
        self._partial = partial
        self._manifest = manifest
        self._planner = planner
        self._commit = commit

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        # DCP sends these results to the first rank, so the file records are added to them.
        records = [
            WriteResult(MetadataIndex(name), file.size, file) for name, file in self._file_system.records.items()
        ]
        self._file_system.records.clear()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results + records)
        return future

    def stage(self, state_dict: Any) -> Any:
        return state_dict  # `save` has already made the copy, before the ranks agreed to write

    def finish(
        self,
        metadata: Metadata,  # noqa: ARG002  empty: `SavePlanner` keeps the metadata on the first rank
        results: list[list[WriteResult]],
    ) -> None:
        assert self._planner.global_metadata is not None, "only the first rank gets here, and it has planned"
        all_results = [result for rank_results in results for result in rank_results]
        files = {
            result.index.fqn: result.storage_data
            for result in all_results
            if isinstance(result.storage_data, FileRecord)
        }
        super().finish(
            replace(self._planner.global_metadata),  # a copy: torch adds to it, and the planner keeps the original
            [[result for result in all_results if not isinstance(result.storage_data, FileRecord)]],
        )
        # torch writes .metadata under a temporary name and renames it.
        files |= {name.removesuffix(".tmp"): record for name, record in self._file_system.records.items()}
        if missing := sorted(name for name in files if not (self._partial / name).exists()):
            raise CheckpointError(
                f"the first rank does not see files that other ranks wrote into {self._partial}: "
                f"{abbreviated(missing)}; save into a file system that all ranks share"
            )
        read_plain_values(self._partial)
        # The manifest must be on disk before the folder gets its final name.
        replace(self._manifest, files=files).write(self._partial)
        self._commit(self._partial)


class HashingFileSystem(FileSystem):
    """Files on disk; records the size and checksum of each file it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as stream:
            hashing = HashingStream(stream)
            yield hashing
            self.records[Path(path).name] = FileRecord(hashing.size, hashing.digest.hexdigest())


class HashingStream(io.RawIOBase):
    """Hashes the bytes on their way to another stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.digest: xxhash.xxh3_128 = xxhash.xxh3_128()
        self.size: int = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        written: int = self._stream.write(data)
        self.size += written
        return written

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        self._stream.flush()  # torch syncs the file through its descriptor without flushing it first
        return self._stream.fileno()
