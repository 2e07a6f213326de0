"""Full tensors in files that other libraries read, in the Hugging Face layout; written and read one at a time."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.step_folders import fsync
from ema_dist.checkpoint.weights.formats import (
    FORMATS,
    INDEX_SUFFIX,
    FileFormat,
    FileWriter,
    OpenedFile,
    detect_format,
    dtype_name,
    unsupported_reason,
)
from ema_dist.messages import abbreviated

PARTIAL_FOLDER = ".export-incomplete"
"""The folder inside the export's folder in which its files are written."""

UNIT_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_in_bytes(size: int | str) -> int:
    """Convert a number of bytes, or a text like ``"5GB"``, to a number of bytes.

    Raises: ValueError for anything else, and for sizes that are not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = UNIT_BYTES.get(match[2].upper()) if match else None
    if match is None or unit is None or (nbytes := int(float(match[1]) * unit)) < 1:
        raise ValueError(f'max_shard_size is a positive number of bytes or a text like "5GB", got {size!r}')
    return nbytes


@final
class WeightWriter:
    """Writes full tensors one at a time: into one file (``model.safetensors``), or into several and their index.

    A context manager: files are written into a folder inside ``folder``, and moved to their places when the block
    returns; when it raises, they are removed. An earlier export of the same format stays complete until then. It is
    replaced in this order: its index is removed, then its files, then the new files are moved in, and last the new
    index or single file. A process killed in between leaves files without an index, which no reader takes for a model.
    Only one process at a time writes into a folder, if the file system supports locks.

    Args:
        folder: created if it does not exist.
        planned: every entry's shape and dtype, on the meta device, in the order of `add`; None for values that are not
            tensors.
        max_shard_size: bytes of tensors in a file, as a number or like ``"5GB"``; a larger tensor gets its own file.
        file_format: ``"torch"`` writes ``pytorch_model.bin`` by ``torch.save``, and keeps values that are not tensors.

    Memory: nothing beside the tensor that is written; the tensors of one file with ``"torch"``.
    Raises: ValueError for a dtype that the format cannot hold or an invalid size, before anything is written; on
        entering, FileExistsError when the folder holds weights in the other format, or folders with the names of files
        to write; BlockingIOError when another export into it is going on.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        planned: Mapping[str, Tensor | None],
        max_shard_size: int | str = "5GB",
        file_format: FileFormat = "safetensors",
    ) -> None:
        if file_format not in FORMATS:
            raise ValueError(f"file_format is one of {[*FORMATS]}, got {file_format!r}")
        self.folder = Path(folder)
        self._format = FORMATS[file_format]
        self._skipped = {
            name for name, value in planned.items() if value is None and not self._format.keeps_non_tensors
        }
        self._planned = {name: value for name, value in planned.items() if name not in self._skipped}
        if not self._planned:
            raise ValueError(f"there is no tensor to write into {self.folder}")
        tensors = {name: value for name, value in self._planned.items() if value is not None}
        if not self._format.keeps_non_tensors and (
            unsupported := {n: reason for n, value in tensors.items() if (reason := unsupported_reason(n, value))}
        ):
            raise ValueError(
                f'safetensors files cannot hold {unsupported}; cast or rename them, or use file_format="torch"'
            )
        self._split = split_state_dict_into_shards_factory(
            self._planned,
            get_storage_size=lambda value: 0 if value is None else value.nbytes,
            filename_pattern=self._format.stem + "{suffix}" + self._format.suffix,
            max_shard_size=size_in_bytes(max_shard_size),
        )
        self._open_writers: dict[str, FileWriter] = {}
        self._missing = dict.fromkeys(self._planned)
        self._missing_per_file = {file: len(names) for file, names in self._split.filename_to_tensors.items()}
        self._sync_executor = ThreadPoolExecutor(1, "sync")
        self._sync_futures: list[Future[None]] = []
        self._exit_stack = ExitStack()

    @property
    def paths(self) -> list[Path]:
        """The files, in order; the index last, if there is one."""
        names = [*self._split.filename_to_tensors, *[self._format.index_file] * self._split.is_sharded]
        return [self.folder / name for name in names]

    def __enter__(self) -> WeightWriter:
        """Make the folder in which the files are written."""
        with ExitStack() as exit_stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            exit_stack.enter_context(_folder_lock(self.folder))
            self._require_no_conflict()
            if self._skipped:
                warnings.warn(
                    f"{abbreviated(sorted(self._skipped))} are no tensors, and {self._format.suffix} files hold "
                    'nothing else: they are left out; file_format="torch" keeps them',
                    stacklevel=2,
                )
            if self._partial_folder.exists():
                shutil.rmtree(self._partial_folder)
            self._partial_folder.mkdir()
            self._exit_stack = exit_stack.pop_all()
        return self

    def _require_no_conflict(self) -> None:
        other_formats = [file_format for file_format in FORMATS.values() if file_format is not self._format]
        if other_files := [path.name for file_format in other_formats for path in file_format.files(self.folder)]:
            raise FileExistsError(
                f"{self.folder} holds weights in another format, which readers could take for the new ones: "
                f"{', '.join(sorted(other_files))}; remove them, or choose another folder"
            )
        replaced = {*self.paths, *self._format.files(self.folder)}
        if folders := [path.name for path in sorted(replaced) if path.is_dir() and not path.is_symlink()]:
            raise FileExistsError(
                f"{self.folder} holds folders that are called as files of this export: {folders}; remove them, or "
                "choose another folder"
            )

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Move the files to their places; after an exception, remove them."""
        with self._exit_stack:
            try:
                if error_type is None:
                    self._publish()
            finally:
                self._open_writers.clear()
                self._sync_executor.shutdown()
                shutil.rmtree(self._partial_folder, ignore_errors=True)  # the next export removes what is left

    def add(self, name: str, value: Any) -> None:
        """Take the next entry, and finish its file if it is complete; until then the tensor must not change.

        Raises: ValueError when the entry was not planned with this dtype and shape, or was added before.
        """
        if name in self._skipped:
            return
        if name not in self._missing:
            raise ValueError(f"{name!r} is written already, or was never planned for {self.folder}")
        planned = self._planned[name]
        if _dtype_and_shape(value) != _dtype_and_shape(planned):
            raise ValueError(f"{name!r} was planned as {_dtype_and_shape(planned)}, got {_dtype_and_shape(value)}")
        del self._missing[name]
        file = self._split.tensor_to_filename[name]
        self._missing_per_file[file] -= 1
        if file not in self._open_writers:
            file_entries = {
                entry_name: self._planned[entry_name] for entry_name in self._split.filename_to_tensors[file]
            }
            self._open_writers[file] = self._format.open_writer(self._partial_folder / file, file_entries)
        self._open_writers[file].add(name, _to_plain_cpu(value) if isinstance(value, Tensor) else value)
        if not self._missing_per_file[file]:
            self._open_writers.pop(file).close()
            # In a thread, so that the next file is written meanwhile.
            self._sync_futures.append(self._sync_executor.submit(fsync, self._partial_folder / file))

    @property
    def _partial_folder(self) -> Path:
        return self.folder / PARTIAL_FOLDER

    def _publish(self) -> None:
        if self._missing:
            raise ValueError(f"these tensors were planned for {self.folder} and did not come: {[*self._missing]}")
        for future in self._sync_futures:
            future.result()
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            (self._partial_folder / self._format.index_file).write_text(json.dumps(index, indent=2) + "\n")
            fsync(self._partial_folder / self._format.index_file)
        *shards, entry_file = self.paths
        # Old names first, the entry file before the others: readers must never find a mixture. A single new file
        # replaces a single old one atomically. Each fsync keeps the disk from reordering the steps.
        for path in self._format.files(self.folder):
            if path != entry_file or shards:
                path.unlink()
        fsync(self.folder)
        for path in shards:
            (self._partial_folder / path.name).replace(path)
        fsync(self.folder)
        (self._partial_folder / entry_file.name).replace(entry_file)
        fsync(self.folder)


class WeightReader(Mapping[str, Any]):
    """Full tensors by name from weight files; each is read on access, and nothing in a file is run.

    Args:
        path: a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file with tensors by name, an index, or a folder with
            one index or one ``model.safetensors`` or ``pytorch_model.bin``.

    Memory: one tensor, and the mapped pages of one file, which the system reclaims when it needs them.
    Raises: CheckpointError on access, not on construction, when a file is missing or damaged, holds other tensors than
        its index says, would run code, or lies outside of the index's folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._source = path
        self._last_opened: tuple[Path, OpenedFile] | None = None

    @cached_property
    def path(self) -> Path:
        """The path given, a file or a folder."""
        return Path(self._source)

    @cached_property
    def meta_tensors(self) -> dict[str, Tensor | None]:
        """Every entry's shape and dtype, on the meta device, in file order; None for values that are not tensors."""
        return {name: value.to("meta") if isinstance(value, Tensor) else None for name, value in self.items()}

    def __getitem__(self, name: str) -> Any:
        path = self._files[name]
        with _wrap_errors(path):
            return _require_dense(path, name, self._open(path).read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The file of each name."""
        with _wrap_errors(self.path):
            entry_file = _find_entry_file(self.path)
        if not entry_file.name.endswith(INDEX_SUFFIX):
            return dict.fromkeys(self._open(entry_file).names, entry_file)
        with _wrap_errors(entry_file):
            names_by_file = _read_index(entry_file)
        for path, names in names_by_file.items():
            if differing := names ^ set(self._open(path).names):
                raise CheckpointError(f"{path} and {entry_file.name} differ in {abbreviated(sorted(differing))}")
        return {name: path for path in names_by_file for name in self._open(path).names}

    def _open(self, path: Path) -> OpenedFile:
        """Open a file, unless it is the one opened last."""
        if self._last_opened is None or self._last_opened[0] != path:
            self._last_opened = None
            with _wrap_errors(path):
                self._last_opened = path, detect_format(path).open(path)
        return self._last_opened[1]


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on a folder; the system releases it when the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BlockingIOError(
            f"another export into {folder} is going on; wait for its end, or choose another folder"
        ) from None
    except OSError:
        pass  # some file systems, NFS among them, cannot lock folders
    try:
        yield
    finally:
        os.close(descriptor)


def _find_entry_file(path: Path) -> Path:
    """The file with which reading begins: an index, or a single file of weights."""
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    if not path.is_dir():
        return path
    singles = [path / file_format.single_file for file_format in FORMATS.values()]
    indices = [
        index
        for file_format in FORMATS.values()
        for index in sorted(path.glob("*" + file_format.suffix + INDEX_SUFFIX))
    ]
    candidates = indices + [single_file for single_file in singles if single_file.exists()]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise CheckpointError(
            f"{path} holds several models: name one of {[entry_file.name for entry_file in candidates]}"
        )
    shard_names = [shard.name for file_format in FORMATS.values() for shard in file_format.files(path)]
    raise CheckpointError(
        f"{path} holds no weights: expected an index or one of {[single_file.name for single_file in singles]}"
        + (
            f", found {shard_names} without their index: an export that was interrupted, do it again"
            if shard_names
            else ""
        )
    )


def _read_index(entry_file: Path) -> dict[Path, set[str]]:
    """The names in each file, according to an index.

    Raises: CheckpointError when a file does not lie beside the index, or is not of the index's format.
    """
    weight_map = json.loads(entry_file.read_bytes())["weight_map"]
    names: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(entry_file.parent / file, set()).add(name)
    suffix = Path(entry_file.name.removesuffix(INDEX_SUFFIX)).suffix
    for path in names:
        if (
            path.resolve().parent != entry_file.parent.resolve()
            or path.parent != entry_file.parent
            or "\\" in path.name
        ):
            raise CheckpointError(f"{entry_file} names {str(path)!r}, which leads outside of its folder")
        if path.suffix != suffix or not path.is_file():
            raise CheckpointError(f"{entry_file} names {path.name!r}, which is no {suffix} file beside it")
    return names


@contextmanager
def _wrap_errors(path: Path) -> Iterator[None]:
    """Turn every exception into a CheckpointError that names the file: parsers raise all kinds of errors."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def _require_dense(path: Path, name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and (value.layout is not torch.strided or value.device.type != "cpu"):
        raise CheckpointError(f"{path}: expected {name!r} to be a dense tensor, found {value.layout} on {value.device}")
    return value


def _dtype_and_shape(value: Any) -> tuple[str, tuple[int, ...]] | str:
    return (dtype_name(value), tuple(value.shape)) if isinstance(value, Tensor) else "no tensor"


def _to_plain_cpu(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, with its conjugate and negative bits resolved."""
    return tensor.detach().cpu().resolve_conj().resolve_neg()
