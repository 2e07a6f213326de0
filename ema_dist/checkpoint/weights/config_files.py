"""The files beside weights that `from_pretrained` reads: configuration and tokenizer."""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.weights.formats import COPIED_KEY, INDEX_SUFFIX, own_metadata
from ema_dist.messages import abbreviated

CONFIG_SUFFIXES = (".codes", ".jinja", ".json", ".model", ".spm", ".tiktoken", ".txt", ".vocab")
"""Configuration, vocabularies and chat templates; no weights, and no code."""


def config_files(folder: Path) -> list[Path]:
    """The files of configuration and tokenizer in a folder, without its subfolders and the indices of weights.

    Raises: CheckpointError when there are none.
    """
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in names if path.suffix in CONFIG_SUFFIXES and path.is_file()]
    files = [path for path in files if not path.name.endswith(INDEX_SUFFIX)]
    if not files:
        found = f"found {len(names)} other files" if names else "found no such folder, or an empty one"
        raise CheckpointError(
            f"expected configuration files such as config.json in {folder}, {found}; give the folder of the model "
            "that was trained"
        )
    return files


def copied_checksums(weights: Path) -> dict[str, str]:
    """The checksums, by name, of the files that an export by this package copied beside its index or single file."""
    try:
        record = json.loads((own_metadata(weights) or {}).get(COPIED_KEY, "{}"))
        return {name: value for name, value in record.items() if isinstance(value, str)}
    except (AttributeError, TypeError, ValueError, RecursionError):
        return {}  # not written by this package after all: nothing counts as copied


def checksum(path: Path) -> str:
    """The SHA-256 of a file of configuration, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe_edit(path: Path, source: Path, copied: Mapping[str, str]) -> str:
    """Describe what would be lost if ``source`` replaced ``path``; empty if they are equal or ``path`` is an old copy.

    Args:
        copied: the checksums, by file name, of what was copied into the folder of ``path``.
    """
    if not path.is_file():
        return f"{path.name} is not a file"
    if filecmp.cmp(path, source, shallow=False) or checksum(path) == copied.get(path.name):
        return ""
    return f"{path.name} differs from {source} {_where_different(path.read_bytes(), source.read_bytes())}"


def _where_different(content: bytes, other: bytes) -> str:
    """The first keys, if both are JSON objects, else the first line."""
    try:
        values, other_values = json.loads(content), json.loads(other)
        in_one_only = values.keys() ^ other_values.keys()
        changed = {key for key in values.keys() & other_values.keys() if values[key] != other_values[key]}
        if keys := sorted(in_one_only | changed):
            return f"in {abbreviated(map(repr, keys), limit=5)}"
    except (AttributeError, TypeError, ValueError, RecursionError):
        pass
    lines = zip_longest(content.splitlines(keepends=True), other.splitlines(keepends=True))
    return f"from line {next(number for number, (line, other_line) in enumerate(lines, 1) if line != other_line)} on"
