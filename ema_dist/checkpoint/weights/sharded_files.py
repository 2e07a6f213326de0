"""Writes full tensors one at a time into one file, or into several files and their index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from ema_dist.checkpoint.step_folders import fsync
from ema_dist.checkpoint.weights.formats import WRITER_MARK, FileWriter, FormatSpec, dtype_name, unsupported_reason
from ema_dist.messages import abbreviated

UNIT_BYTES = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, base in (("IB", 1024), ("B", 1000))
}


def size_in_bytes(size: int | str) -> int:
    """Convert a number of bytes, or a text like ``"5GiB"``, to a number of bytes.

    Raises: ValueError for anything else, and for sizes that are not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = UNIT_BYTES.get(match[2].upper()) if match else None
    if match is None or unit is None or (nbytes := int(float(match[1]) * unit)) < 1:
        raise ValueError(
            f'expected max_shard_size to be a positive number of bytes, or a text like "5GiB", got {size!r}'
        )
    return nbytes


class ShardedFiles:
    """The files of one model in one format: which entry is in which file, and the writing of some or all of them.

    Args:
        planned: every entry's shape and dtype, on the meta device, in the order of `add`; None for values that are not
            tensors.
        max_shard_size: bytes of tensors in a file, as a number or like ``"5GiB"``; a larger tensor gets its own file.

    Memory: nothing beyond the tensor being written; with ``"torch"``, the tensors of one file.
    Raises: ValueError for a dtype that the format cannot hold, an invalid size, and when there is nothing to write.
    """

    def __init__(
        self, planned: Mapping[str, Tensor | None], file_format: FormatSpec, *, max_shard_size: int | str
    ) -> None:
        self._format = file_format
        self.skipped: set[str] = {
            name for name, value in planned.items() if value is None and not file_format.keeps_non_tensors
        }
        """The names of the values that the format cannot hold because they are not tensors."""
        self._planned = {name: value for name, value in planned.items() if name not in self.skipped}
        if not self._planned:
            raise ValueError("expected at least one value that the format can hold, got none")
        tensors = {name: value for name, value in self._planned.items() if value is not None}
        if not file_format.keeps_non_tensors and (
            unsupported := [
                f"{n!r} ({reason})" for n, value in tensors.items() if (reason := unsupported_reason(n, value))
            ]
        ):
            raise ValueError(
                f"safetensors files cannot hold {abbreviated(unsupported)}: cast or rename them, or use "
                'file_format="torch"'
            )
        self._split = split_state_dict_into_shards_factory(
            self._planned,
            get_storage_size=lambda value: 0 if value is None else value.nbytes,
            filename_pattern=_escape_braces(file_format.stem) + "{suffix}" + file_format.suffix,
            max_shard_size=size_in_bytes(max_shard_size),
        )
        self._folder = Path()
        self._file_metadata: Mapping[str, str] = WRITER_MARK
        self._open_writers: dict[str, FileWriter] = {}
        self._missing = dict.fromkeys(self._planned)
        self._missing_per_file = {file: len(names) for file, names in self.names_by_file.items()}
        self._sync_executor = ThreadPoolExecutor(1, "sync")
        self._sync_futures: list[Future[None]] = []

    @property
    def names_by_file(self) -> dict[str, list[str]]:
        """The names of the entries in each file, in order; without the index."""
        return self._split.filename_to_tensors

    @property
    def has_index(self) -> bool:
        """Whether there are several files, and an index of them."""
        return self._split.is_sharded

    @property
    def file_names(self) -> list[str]:
        """The files, in order; the index last, if there is one."""
        return [*self.names_by_file, *[self._format.index_file] * self.has_index]

    def start(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write into ``folder`` from now on; a single file gets this metadata."""
        self._folder = folder
        self._file_metadata = WRITER_MARK if self.has_index else metadata

    def add(self, name: str, value: Any) -> None:
        """Take the next entry, and finish its file if it is complete; until then the tensor must not change.

        Raises: ValueError when the entry was not planned with this dtype and shape, or was added before.
        """
        if name in self.skipped:
            return
        if name not in self._missing:
            raise ValueError(f"expected a planned entry that was not added yet, for {self._folder}, got {name!r}")
        planned = self._planned[name]
        if _dtype_and_shape(value) != _dtype_and_shape(planned):
            raise ValueError(f"{name!r} was planned as {_dtype_and_shape(planned)}, got {_dtype_and_shape(value)}")
        del self._missing[name]
        file = self._split.tensor_to_filename[name]
        self._missing_per_file[file] -= 1
        if file not in self._open_writers:
            file_entries = {entry_name: self._planned[entry_name] for entry_name in self.names_by_file[file]}
            self._open_writers[file] = self._format.open_writer(self._folder / file, file_entries, self._file_metadata)
        self._open_writers[file].add(name, _to_plain_cpu(value) if isinstance(value, Tensor) else value)
        if not self._missing_per_file[file]:
            self._open_writers.pop(file).close()
            # In a thread, while the next file is written.
            self._sync_futures.append(self._sync_executor.submit(fsync, self._folder / file))

    def missing(self, files: set[str] | None = None) -> list[str]:
        """The planned entries of these files (None: of all) that have not been added."""
        return [name for name in self._missing if files is None or self._split.tensor_to_filename[name] in files]

    def wait(self) -> None:
        """Wait until the finished files are on disk."""
        for future in self._sync_futures:
            future.result()

    def write_index(self, metadata: Mapping[str, str]) -> None:
        """Write the index, if there are several files."""
        if self.has_index:
            index = {"metadata": {**self._split.metadata, **metadata}, "weight_map": self._split.tensor_to_filename}
            path = self._folder / self._format.index_file
            path.write_text(json.dumps(index, indent=2) + "\n")
            fsync(path)

    def close(self) -> None:
        """Discard unfinished files, and wait for the thread that syncs files."""
        self._open_writers.clear()
        self._sync_executor.shutdown()


def _dtype_and_shape(value: Any) -> tuple[str, tuple[int, ...]] | str:
    return (dtype_name(value), tuple(value.shape)) if isinstance(value, Tensor) else "not a tensor"


def _to_plain_cpu(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, with its conjugate and negative bits resolved."""
    return tensor.detach().cpu().resolve_conj().resolve_neg()


def _escape_braces(text: str) -> str:
    """Escape the text for a format string."""
    return text.replace("{", "{{").replace("}", "}}")
