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
from ema_dist.checkpoint.folders import sync
from ema_dist.checkpoint.weights.formats import (
    FORMATS,
    INDEX,
    FileFormat,
    FileWriter,
    Opened,
    dtype_name,
    format_of,
    unholdable,
)
from ema_dist.messages import few

ASIDE = ".export-incomplete"
"""The folder inside an export's own in which its files are written."""

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_in_bytes(size: int | str) -> int:
    """A number of bytes, or a text like ``"5GB"``, as a number.

    Raises: ValueError for what is neither, or no positive size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or (count := int(float(found[1]) * unit)) < 1:
        raise ValueError(f'max_shard_size is a positive number of bytes or a text like "5GB", got {size!r}')
    return count


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
        keeps_all = file_format == "torch"
        self._left_out = {name for name, value in planned.items() if value is None and not keeps_all}
        self._planned = {name: value for name, value in planned.items() if name not in self._left_out}
        if not self._planned:
            raise ValueError(f"there is no tensor to write into {self.folder}")
        tensors = {name: value for name, value in self._planned.items() if value is not None}
        if not keeps_all and (wrong := {n: why for n, value in tensors.items() if (why := unholdable(n, value))}):
            raise ValueError(f'safetensors files cannot hold {wrong}; cast or rename them, or use file_format="torch"')
        self._split = split_state_dict_into_shards_factory(
            self._planned,
            get_storage_size=lambda value: 0 if value is None else value.nbytes,
            filename_pattern=self._format.stem + "{suffix}" + self._format.suffix,
            max_shard_size=size_in_bytes(max_shard_size),
        )
        self._open: dict[str, FileWriter] = {}
        self._missing = dict.fromkeys(self._planned)
        self._missing_in = {file: len(names) for file, names in self._split.filename_to_tensors.items()}
        self._background = ThreadPoolExecutor(1, "sync")
        self._syncing: list[Future[None]] = []
        self._held = ExitStack()

    @property
    def paths(self) -> list[Path]:
        """The files, in order; the index last, where there is one."""
        names = [*self._split.filename_to_tensors, *[self._format.index] * self._split.is_sharded]
        return [self.folder / name for name in names]

    def __enter__(self) -> WeightWriter:
        """Make the folder in which the files are written."""
        with ExitStack() as held:
            self.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(self.folder))
            self._require_room()
            if self._left_out:
                warnings.warn(
                    f"{few(sorted(self._left_out))} are no tensors, and {self._format.suffix} files hold nothing else: "
                    'they are left out; file_format="torch" keeps them',
                    stacklevel=2,
                )
            if self._aside.exists():
                shutil.rmtree(self._aside)
            self._aside.mkdir()
            self._held = held.pop_all()
        return self

    def _require_room(self) -> None:
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
        with self._held:
            try:
                if kind is None:
                    self._publish()
            finally:
                self._open.clear()
                self._background.shutdown()
                shutil.rmtree(self._aside, ignore_errors=True)  # the next export removes what stays

    def add(self, name: str, value: Any) -> None:
        """Take the next entry, and write its file if it completes one; until then the tensor must not change.

        Raises: ValueError when it is not what was planned under that name, or is planned no more.
        """
        if name in self._left_out:
            return
        if name not in self._missing:
            raise ValueError(f"{name!r} is written already, or was never planned for {self.folder}")
        planned = self._planned[name]
        if _outline(value) != _outline(planned):
            raise ValueError(f"{name!r} was planned as {_outline(planned)}, got {_outline(value)}")
        del self._missing[name]
        file = self._split.tensor_to_filename[name]
        self._missing_in[file] -= 1
        if file not in self._open:
            of_file = {it: self._planned[it] for it in self._split.filename_to_tensors[file]}
            self._open[file] = self._format.write(self._aside / file, of_file)
        self._open[file].add(name, _plain(value) if isinstance(value, Tensor) else value)
        if not self._missing_in[file]:
            self._open.pop(file).close()
            # Meanwhile the tensors of the next file come.
            self._syncing.append(self._background.submit(sync, self._aside / file))

    @property
    def _aside(self) -> Path:
        return self.folder / ASIDE

    def _publish(self) -> None:
        if self._missing:
            raise ValueError(f"these tensors were planned for {self.folder} and did not come: {[*self._missing]}")
        for synced in self._syncing:
            synced.result()
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            (self._aside / self._format.index).write_text(json.dumps(index, indent=2) + "\n")
            sync(self._aside / self._format.index)
        *shards, entry = self.paths
        for path in self._format.files(self.folder):
            if path != entry or shards:
                path.unlink()
        sync(self.folder)
        for path in shards:
            (self._aside / path.name).replace(path)
        sync(self.folder)
        (self._aside / entry.name).replace(entry)
        sync(self.folder)


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
        self._given = path
        self._last: tuple[Path, Opened] | None = None

    @cached_property
    def path(self) -> Path:
        """Where reading begins."""
        return Path(self._given)

    @cached_property
    def shapes(self) -> dict[str, Tensor | None]:
        """Every entry's shape and dtype, on the meta device, file by file; None for what is no tensor."""
        return {name: value.to("meta") if isinstance(value, Tensor) else None for name, value in self.items()}

    def __getitem__(self, name: str) -> Any:
        path = self._files[name]
        with _blaming(path):
            return _readable(path, name, self._open(path).read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Which file holds which name."""
        with _blaming(self.path):
            entry = _entry(self.path)
        if not entry.name.endswith(INDEX):
            return dict.fromkeys(self._open(entry).names, entry)
        with _blaming(entry):
            indexed = _read_index(entry)
        for path, names in indexed.items():
            if differing := names ^ set(self._open(path).names):
                raise CheckpointError(f"{path} and {entry.name} differ in {few(sorted(differing))}")
        return {name: path for path in indexed for name in self._open(path).names}

    def _open(self, path: Path) -> Opened:
        """Open a file, unless it was the last one that was."""
        if self._last is None or self._last[0] != path:
            self._last = None
            with _blaming(path):
                self._last = path, format_of(path).open(path)
        return self._last[1]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
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


def _entry(path: Path) -> Path:
    """The file with which reading begins."""
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    if not path.is_dir():
        return path
    singles = [path / known.single for known in FORMATS.values()]
    indices = [index for known in FORMATS.values() for index in sorted(path.glob("*" + known.suffix + INDEX))]
    found = indices + [single for single in singles if single.exists()]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{path} holds several models: name one of {[entry.name for entry in found]}")
    parts = [part.name for known in FORMATS.values() for part in known.files(path)]
    raise CheckpointError(
        f"{path} holds no weights: expected an index or one of {[single.name for single in singles]}"
        + (f", found {parts} without their index: an export that was interrupted, do it again" if parts else "")
    )


def _read_index(entry: Path) -> dict[Path, set[str]]:
    """The names in each file, as an index says.

    Raises: CheckpointError when a file is not a plain one beside the index, in the index's own format.
    """
    weight_map = json.loads(entry.read_bytes())["weight_map"]
    names: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(entry.parent / file, set()).add(name)
    suffix = Path(entry.name.removesuffix(INDEX)).suffix
    for path in names:
        if path.resolve().parent != entry.parent.resolve() or path.parent != entry.parent or "\\" in path.name:
            raise CheckpointError(f"{entry} names {str(path)!r}, which leads outside of its folder")
        if path.suffix != suffix or not path.is_file():
            raise CheckpointError(f"{entry} names {path.name!r}, which is no {suffix} file beside it")
    return names


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn whatever is raised inside into a CheckpointError that names a file: parsers raise all kinds of errors."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def _readable(path: Path, name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and (value.layout is not torch.strided or value.device.type != "cpu"):
        raise CheckpointError(f"{path}: expected {name!r} to be a dense tensor, found {value.layout} on {value.device}")
    return value


def _outline(value: Any) -> tuple[str, tuple[int, ...]] | str:
    return (dtype_name(value), tuple(value.shape)) if isinstance(value, Tensor) else "no tensor"


def _plain(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, with nothing that is only noted about its values."""
    return tensor.detach().cpu().resolve_conj().resolve_neg()
