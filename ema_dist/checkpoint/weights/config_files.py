"""The files that `from_pretrained` reads beside the weights: configuration and tokenizer."""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Container, Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.weights.formats import COPIED_CHECKSUMS_KEY, INDEX_SUFFIX
from ema_dist.messages import abbreviated

CONFIG_SUFFIXES = (".codes", ".jinja", ".json", ".model", ".spm", ".tiktoken", ".txt", ".vocab")
"""Suffixes of configuration, vocabularies and chat templates, but not of weights or code."""


def config_files(folder: Path) -> list[Path]:
    """The files of configuration and tokenizer in a folder, without its subfolders and the indices of weights.

    Raises: CheckpointError when there are none.
    """
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in names if path.suffix in CONFIG_SUFFIXES and path.is_file()]
    files = [path for path in files if not path.name.endswith(INDEX_SUFFIX)]
    if not files:
        found = f"found {len(names)} other files" if names else "found no files"
        raise CheckpointError(
            f"expected configuration files such as config.json in {folder}, {found}; give the folder of the model "
            "that was trained"
        )
    return files


def unedited_copies(folder: Path, metadata: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The checksums, by name, of the files in ``folder`` that this package copied there and nobody has edited since.

    Args:
        metadata: of the indices and single files of all exports into ``folder`` by this package.
    """
    records = [(name, value) for each in metadata for name, value in _copied_checksums(each).items()]
    present = {path.name: path for path in folder.iterdir() if path.is_file()}
    return {name: value for name, value in records if name in present and checksum(present[name]) == value}


def _copied_checksums(metadata: Mapping[str, Any]) -> dict[str, str]:
    try:
        record = json.loads(metadata.get(COPIED_CHECKSUMS_KEY, "{}"))
        return {name: value for name, value in record.items() if isinstance(value, str)}
    except (AttributeError, TypeError, ValueError, RecursionError):
        return {}  # this package did not write the record, so no file counts as copied


def checksum(path: Path) -> str:
    """The SHA-256 of a configuration file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe_edit(path: Path, source: Path, unedited: Container[str]) -> str:
    """Describe what would be lost if ``source`` replaced ``path``; empty if they are equal or ``path`` is an old copy.

    Args:
        unedited: the names of the `unedited_copies` in the folder of ``path``.
    """
    if not path.is_file():
        return f"{path.name} is not a file"
    if path.name in unedited or filecmp.cmp(path, source, shallow=False):
        return ""
    return f"{path.name} differs from {source} {_where_different(path.read_bytes(), source.read_bytes())}"


def _where_different(content: bytes, other: bytes) -> str:
    """Where two files differ: the keys of the top level if both are JSON objects, else the first line."""
    if keys := _different_keys(content, other):
        return f"in {abbreviated(map(repr, keys), limit=5)}"
    return f"from line {_first_different_line(content, other)} on"


def _different_keys(content: bytes, other: bytes) -> list[str]:
    """The top-level keys with different values; empty unless both are JSON objects."""
    try:
        values, other_values = json.loads(content), json.loads(other)
        in_one_only = values.keys() ^ other_values.keys()
        return sorted(in_one_only | {key for key in values.keys() - in_one_only if values[key] != other_values[key]})
    except (AttributeError, TypeError, ValueError, RecursionError):
        return []


def _first_different_line(content: bytes, other: bytes) -> int:
    lines = zip_longest(content.splitlines(keepends=True), other.splitlines(keepends=True))
    return next(number for number, (line, other_line) in enumerate(lines, 1) if line != other_line)
