"""Reads full tensors from weight files, by this package or others; nothing in a file is run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.values import unreadable_reason
from ema_dist.checkpoint.weights.formats import FORMATS, INDEX_SUFFIX, SHARD_NUMBERS, OpenedFile, detect_format
from ema_dist.checkpoint.weights.torch_archive import refused_names
from ema_dist.messages import abbreviated


class WeightReader(Mapping[str, Any]):
    """Full tensors by name from weight files; each is read on access, and nothing in a file is run.

    Args:
        path: a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file with tensors by name, an index, or a folder with
            one index, one ``model.safetensors`` or ``pytorch_model.bin``, or else one file of another name.

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
                raise CheckpointError(
                    f"{path} does not hold the tensors that {entry_file.name} lists for it; they differ in "
                    f"{abbreviated(sorted(differing))}"
                )
        return {name: path for path in names_by_file for name in self._open(path).names}

    def _open(self, path: Path) -> OpenedFile:
        """Open a file, unless it is the one opened last."""
        if self._last_opened is None or self._last_opened[0] != path:
            self._last_opened = None
            with _wrap_errors(path):
                self._last_opened = path, detect_format(path).open(path)
        return self._last_opened[1]


def _find_entry_file(path: Path) -> Path:
    """The file to read first: an index, or a single file of weights."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not path.is_dir():
        return path
    files = sorted(path.iterdir())
    suffixes = tuple(suffix for file_format in FORMATS.values() for suffix in file_format.suffixes)
    indices = [file for file in files if file.name.endswith(tuple(suffix + INDEX_SUFFIX for suffix in suffixes))]
    singles = [path / file_format.single_file for file_format in FORMATS.values()]
    # Programs write other files (training_args.bin) beside the weights, so files with the usual names come first.
    candidates = indices + [single_file for single_file in singles if single_file.exists()]
    shard_names = [file.name for file in files if re.search(SHARD_NUMBERS + "$", file.stem) and file.suffix in suffixes]
    if not candidates and not shard_names:
        candidates = [file for file in files if file.suffix in suffixes]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise CheckpointError(
            f"{path} holds several models: give the path of one of {[entry_file.name for entry_file in candidates]}"
        )
    raise CheckpointError(
        f"{path} holds no weights: expected an index or a file like {[single_file.name for single_file in singles]}"
        + (
            f", found {abbreviated(shard_names)} without their index: the export was interrupted, so repeat it"
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
            raise CheckpointError(f"{entry_file} names {path.name!r}, but there is no such {suffix} file beside it")
    return names


@contextmanager
def _wrap_errors(path: Path) -> Iterator[None]:
    """Turn every exception into a CheckpointError that names the file: parsers raise all kinds of errors."""
    try:
        yield
    except CheckpointError:
        raise
    except UnpicklingError as error:  # torch's own message recommends weights_only=False
        refused = abbreviated(refused_names(path, str(error)))
        found = f"it holds {refused}" if refused else "it is damaged, or no file by torch.save"
        raise CheckpointError(f"{path} cannot be read without running code: {found}. Nothing in it was run") from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def _require_dense(path: Path, name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and (reason := unreadable_reason(value)):
        raise CheckpointError(f"{path}: expected {name!r} to be a dense tensor, found {reason}")
    return value
