"""Writes full tensors one at a time into files that other libraries read, in the Hugging Face layout."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, final

from torch import Tensor

from ema_dist.checkpoint.folders import folder_lock, made_folder
from ema_dist.checkpoint.step_folders import fsync
from ema_dist.checkpoint.weights.config_files import checksum, describe_edit, unedited_copies
from ema_dist.checkpoint.weights.formats import (
    COPIED_CHECKSUMS_KEY,
    FORMATS,
    WRITER_MARK,
    FileFormat,
    entry_files,
    own_metadata,
)
from ema_dist.checkpoint.weights.sharded_files import ShardedFiles
from ema_dist.messages import abbreviated
from ema_dist.signals import deferred_signals

PARTIAL_FOLDER = ".export-incomplete"
"""The folder inside the export's folder in which its files are written."""


@final
class WeightWriter:
    """Writes full tensors one at a time: into one file (``model.safetensors``), or into several and their index.

    A context manager: files are written into a folder inside ``folder``, and moved to their places when the block
    returns; when it raises, they are removed. Until then, an earlier export of the same format stays complete. It is
    replaced in this order: its index is removed, then its files; then the new files are moved in, and finally the new
    index or single file. A process killed in between leaves files without an index, which readers reject. Only one
    process at a time can write into a folder, if the file system supports locks.

    Args:
        folder: created if it does not exist.
        planned: every entry's shape and dtype, on the meta device, in the order of `add`; None for values that are not
            tensors.
        max_shard_size: bytes of tensors in a file, as a number or like ``"5GiB"``; a larger tensor gets its own file.
        file_format: ``"torch"`` writes ``pytorch_model.bin`` by ``torch.save``, and keeps values that are not tensors.
        name: the file name; if there are several files, they and their index are named after it. None for
            ``model.safetensors`` or ``pytorch_model.bin``.
        copied: configuration files to copy into ``folder`` together with the weights.
        force: whether to overwrite weights that this package did not write, and configuration files that were edited or
            come from elsewhere. Files that this package wrote, and unedited copies, are always replaced.

    Memory: nothing beyond the tensor being written; with ``"torch"``, the tensors of one file.
    Raises: ValueError for a dtype that the format cannot hold or an invalid size or name, before anything is written;
        on entering, FileExistsError when the folder holds weights in the other format, folders with the names of files
        to write, or, without ``force``, files by other programs; BlockingIOError when another process writes into it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        planned: Mapping[str, Tensor | None],
        max_shard_size: int | str = "5GiB",
        file_format: FileFormat = "safetensors",
        name: str | None = None,
        copied: Sequence[Path] = (),
        force: bool = False,
    ) -> None:
        if file_format not in FORMATS:
            raise ValueError(f"expected file_format to be one of {abbreviated(FORMATS)}, got {file_format!r}")
        self.folder: Path = Path(folder)
        self._format = FORMATS[file_format].named(name or FORMATS[file_format].single_file)
        self._copied = {self.folder / path.name: path for path in copied}
        self._copied_checksums: dict[str, str] = {}
        self._force = force
        if not planned:
            raise ValueError(f"expected at least one tensor to write into {self.folder}, got none")
        self._files = ShardedFiles(planned, self._format, max_shard_size=max_shard_size)
        self._exit_stack = ExitStack()

    @property
    def paths(self) -> list[Path]:
        """The files, in order; the index last, if there is one."""
        return [self.folder / name for name in self._files.file_names]

    @property
    def copied_paths(self) -> list[Path]:
        """The files that are copied into the folder beside the weights."""
        return list(self._copied)

    def __enter__(self) -> WeightWriter:
        """Make the folder in which the files are written."""
        with ExitStack() as exit_stack:
            exit_stack.enter_context(made_folder(self.folder))
            exit_stack.enter_context(folder_lock(self.folder))
            weights = {*self._format.files(self.folder), *entry_files(self.folder)}
            own = {path: metadata for path in weights if (metadata := own_metadata(path)) is not None}
            self._copied_checksums = unedited_copies(self.folder, own.values())
            self._require_no_conflict(own)
            if self._files.skipped:
                warnings.warn(
                    f"{abbreviated(sorted(self._files.skipped))} are left out, because they are not tensors and "
                    f'{self._format.suffix} files hold only tensors; file_format="torch" keeps them',
                    stacklevel=2,
                )
            if self._partial_folder.exists():
                shutil.rmtree(self._partial_folder)
            exit_stack.callback(
                shutil.rmtree, self._partial_folder, ignore_errors=True
            )  # if this fails, the next export removes it
            self._partial_folder.mkdir()
            for target, source in self._copied.items():
                copy = self._partial_folder / target.name
                shutil.copyfile(source, copy)
                fsync(copy)
                self._copied_checksums[target.name] = checksum(copy)
            self._files.start(self._partial_folder, self._metadata)
            self._exit_stack = exit_stack.pop_all()
        return self

    def _require_no_conflict(self, own_weights: Container[Path]) -> None:
        is_default_name = self._format.single_file in {file_format.single_file for file_format in FORMATS.values()}
        other_formats = [
            file_format if is_default_name else replace(file_format, stem=self._format.stem)
            for file_format in FORMATS.values()
            if file_format.open is not self._format.open
        ]
        if other_files := [path.name for file_format in other_formats for path in file_format.files(self.folder)]:
            raise FileExistsError(
                f"{self.folder} holds weights in another format, which readers could load instead of the new ones: "
                f"{abbreviated(sorted(other_files))}; remove them, or choose another folder"
            )
        weights = {*self.paths, *self._format.files(self.folder)}
        replaced = {*weights, *self._copied}
        if folders := [path.name for path in sorted(replaced) if path.is_dir() and not path.is_symlink()]:
            raise FileExistsError(
                f"{self.folder} holds folders with the names of files to be written: {abbreviated(folders)}; "
                "remove them, or choose another folder"
            )
        conflicts: list[str] = []
        if foreign := sorted(path.name for path in weights if os.path.lexists(path) and path not in own_weights):
            conflicts.append(
                f"weights that ema_dist did not write: {abbreviated(foreign)} (choose another folder or name)"
            )
        present = {path: source for path, source in self._copied.items() if os.path.lexists(path)}
        edits = [describe_edit(path, source, self._copied_checksums) for path, source in present.items()]
        if edited := [edit for edit in edits if edit]:
            conflicts.append(
                "configuration files that ema_dist did not copy, or that were edited since: "
                f"{abbreviated(edited, separator='; ')} (leave out --config to keep them, or choose another folder)"
            )
        if conflicts and not self._force:
            raise FileExistsError(
                f"{self.folder} holds {', and '.join(conflicts)}; to overwrite, pass force=True (--force)"
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
                self._files.close()

    def add(self, name: str, value: Any) -> None:
        """Take the next entry, and finish its file if it is complete; until then the tensor must not change.

        Raises: ValueError when the entry was not planned with this dtype and shape, or was added before.
        """
        self._files.add(name, value)

    @property
    def _partial_folder(self) -> Path:
        return self.folder / PARTIAL_FOLDER

    @property
    def _metadata(self) -> dict[str, str]:
        """Metadata for the index, or for the only file."""
        copied = {COPIED_CHECKSUMS_KEY: json.dumps(self._copied_checksums)} if self._copied_checksums else {}
        return {**WRITER_MARK, **copied}

    def _publish(self) -> None:
        if missing := self._files.missing():
            raise ValueError(f"{self.folder} is not written: planned entries were never added: {abbreviated(missing)}")
        self._files.wait()
        self._files.write_index(self._metadata)
        with deferred_signals():  # Ctrl-C must not end this between old and new files
            self._replace_files()

    def _replace_files(self) -> None:
        *shards, entry_file = self.paths
        # Remove the old files first, and the entry file before the others: readers must never find a mixture of old and
        # new files. A single new file replaces a single old one atomically. Each fsync fixes the order on disk.
        for path in self._format.files(self.folder):
            if path != entry_file or shards:
                path.unlink()
        fsync(self.folder)
        for path in [*shards, *self._copied]:
            (self._partial_folder / path.name).replace(path)
        fsync(self.folder)
        (self._partial_folder / entry_file.name).replace(entry_file)
        fsync(self.folder)
