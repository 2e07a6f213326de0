"""Full tensors in files that others read, in the Hugging Face layout: written by stream, read one at a time."""

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
"""The folder inside an export's own in which its files are written."""

UNIT_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_in_bytes(size: int | str) -> int:
    """A number of bytes, or a text like ``"5GB"``, as a number.

    Raises: ValueError for what is neither, or no positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = UNIT_BYTES.get(match[2].upper()) if match else None
    if match is None or unit is None or (nbytes := int(float(match[1]) * unit)) < 1:
        raise ValueError(f'max_shard_size is a positive number of bytes or a text like "5GB", got {size!r}')
    return nbytes


@final
class WeightWriter:
    """Writes full tensors by stream: one file (``model.safetensors``), or several and their index, for a strict load.

    A ``with`` block: files are written aside, in a folder inside ``folder``, and all are put in their places when the
    block returns; when it raises, nothing is left. An earlier export of the same format stays whole until then and is
    replaced: first its index goes, then its files, then the new files come, and the new index, or the only file, last.
    Whoever is killed in between leaves files without an index, which nobody loads as a model. Only one process at a
    time writes into a folder, where the file system can lock it.

    Args:
        folder: made if need be.
        planned: every entry's shape and dtype, on the meta device, in the order of `add`; None for what is no tensor.
        max_shard_size: bytes of tensors in a file, as a number or like ``"5GB"``; one larger tensor has its own file.
        file_format: ``"torch"`` writes ``pytorch_model.bin`` by ``torch.save``, and keeps what is no tensor.

    Memory: nothing beside the tensor that is written; the tensors of one file with ``"torch"``.
    Raises: ValueError for a dtype that the format cannot hold or a size that is none, before anything is written; on
        entering, FileExistsError when the folder holds weights in the other format, or folders called as files will
        be; BlockingIOError when another export into it is going on.
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
        keeps_non_tensors = file_format == "torch"
        self._skipped = {name for name, value in planned.items() if value is None and not keeps_non_tensors}
        self._planned = {name: value for name, value in planned.items() if name not in self._skipped}
        if not self._planned:
            raise ValueError(f"there is no tensor to write into {self.folder}")
        tensors = {name: value for name, value in self._planned.items() if value is not None}
        if not keeps_non_tensors and (
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
        """The files, in order; the index last, where there is one."""
        names = [*self._split.filename_to_tensors, *[self._format.index] * self._split.is_sharded]
        return [self.folder / name for name in names]

    def __enter__(self) -> WeightWriter:
        """Make the folder in which the files are written."""
        with ExitStack() as exit_stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            exit_stack.enter_context(_folder_lock(self.folder))
            self._require_no_conflict()
            if self._skipped:
                warnings.warn(
                    f"{abbreviated(sorted(self._skipped))} are no tensors, and {self._format.suffix} files hold nothing else: "
                    'they are left out; file_format="torch" keeps them',
                    stacklevel=2,
                )
            if self._partial_folder.exists():
                shutil.rmtree(self._partial_folder)
            self._partial_folder.mkdir()
            self._exit_stack = exit_stack.pop_all()
        return self

    def _require_no_conflict(self) -> None:
        if others := [path.name for f in FORMATS.values() if f is not self._format for path in f.files(self.folder)]:
            raise FileExistsError(
                f"{self.folder} holds weights in another format, which readers could take for the new ones: "
                f"{', '.join(sorted(others))}; remove them, or choose another folder"
            )
        replaced = {*self.paths, *self._format.files(self.folder)}
        if folders := [path.name for path in sorted(replaced) if path.is_dir() and not path.is_symlink()]:
            raise FileExistsError(
                f"{self.folder} holds folders that are called as files of this export: {folders}; remove them, or "
                "choose another folder"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put the files in their places, or remove them."""
        with self._exit_stack:
            try:
                if kind is None:
                    self._publish()
            finally:
                self._open_writers.clear()
                self._sync_executor.shutdown()
                shutil.rmtree(self._partial_folder, ignore_errors=True)  # the next export removes what stays

    def add(self, name: str, value: Any) -> None:
        """Take the next entry, and write its file if it completes one; until then the tensor must not change.

        Raises: ValueError when it is not what was planned under that name, or is planned no more.
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
            # Meanwhile the tensors of the next file come.
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
            (self._partial_folder / self._format.index).write_text(json.dumps(index, indent=2) + "\n")
            fsync(self._partial_folder / self._format.index)
        *shards, entry_file = self.paths
        for path in self._format.files(self.folder):
            if path != entry_file or shards:
                path.unlink()
        fsync(self.folder)
        for path in shards:
            (self._partial_folder / path.name).replace(path)
        fsync(self.folder)
        (self._partial_folder / entry_file.name).replace(entry_file)
        fsync(self.folder)


class WeightFiles(Mapping[str, Any]):
    """Full tensors by name out of such files, each read when it is asked for; nothing in a file is ever run.

    Args:
        path: a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file with tensors by name, an index, or a folder with
            one index or one ``model.safetensors`` or ``pytorch_model.bin``.

    Memory: one tensor, and the pages of one file, which the system takes back when it needs them.
    Raises: CheckpointError, not here but when something is asked for, if a file is missing, damaged, holds other
        tensors than its index says, would run something, or lies outside of the index's folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._source = path
        self._last_opened: tuple[Path, OpenedFile] | None = None

    @cached_property
    def path(self) -> Path:
        """Where reading begins."""
        return Path(self._source)

    @cached_property
    def meta_tensors(self) -> dict[str, Tensor | None]:
        """Every entry's shape and dtype, on the meta device, file by file; None for what is no tensor."""
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
        """Which file holds which name."""
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
        """Open a file, unless it was the last one that was."""
        if self._last_opened is None or self._last_opened[0] != path:
            self._last_opened = None
            with _wrap_errors(path):
                self._last_opened = path, detect_format(path).open(path)
        return self._last_opened[1]


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it from a folder; the system lets them in when this one dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BlockingIOError(
            f"another export into {folder} is going on; wait for its end, or choose another folder"
        ) from None
    except OSError:
        pass  # NFS, for one, locks no folders
    try:
        yield
    finally:
        os.close(descriptor)


def _find_entry_file(path: Path) -> Path:
    """The file with which reading begins."""
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
    shard_names = [part.name for file_format in FORMATS.values() for part in file_format.files(path)]
    raise CheckpointError(
        f"{path} holds no weights: expected an index or one of {[single_file.name for single_file in singles]}"
        + (
            f", found {shard_names} without their index: an export that was interrupted, do it again"
            if shard_names
            else ""
        )
    )


def _read_index(entry_file: Path) -> dict[Path, set[str]]:
    """The names in each file, as an index says.

    Raises: CheckpointError when a file is not a plain one beside the index, in the index's own format.
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
    """Turn whatever is raised inside into a CheckpointError that names a file: parsers raise all kinds of errors."""
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
    """The tensor on the CPU, with nothing that is only noted about its values."""
    return tensor.detach().cpu().resolve_conj().resolve_neg()
