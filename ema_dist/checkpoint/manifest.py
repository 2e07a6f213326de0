"""The manifest of a complete checkpoint: every file with its size and checksum."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from ema_dist.checkpoint.dcp.metadata import safe_join
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.step_folders import STEP_NAME, fsync

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 1
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and XXH3 checksum of one file, which detect damage but not forgery."""

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, and how it was saved."""

    step: int
    world_size: int
    layouts: dict[str, str] = field(default_factory=dict)
    """How each model was sharded, in words, by the key of its entry."""
    ties: dict[str, dict[str, str]] = field(default_factory=dict)
    """The first name of each tied tensor by its other names, by the key of the model's entry."""
    models: dict[str, str] = field(default_factory=dict)
    """The key of the averaged model's entry, by the key of the entry that holds its averages."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    torch: str = str(torch.__version__)

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder`` and sync it."""
        content = {"format": MANIFEST_FORMAT, **asdict(self)}
        (folder / MANIFEST_FILE).write_text(json.dumps(content | {"xxh3_128": _digest(content)}, indent=1))
        fsync(folder / MANIFEST_FILE)


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a checkpoint; None for a checkpoint by plain ``dcp.save``.

    Raises: CheckpointError when the manifest is damaged or of another step, or missing in a folder named by `save`.
    """
    path = safe_join(folder, MANIFEST_FILE)
    saved_as = STEP_NAME.fullmatch(folder.resolve().name)
    if not os.path.lexists(path):
        if saved_as:
            raise CheckpointError(
                f"{path} is missing, although save() writes one into every checkpoint: the folder is damaged"
            )
        return None
    try:
        if not path.is_file():
            raise ValueError("it is not a file")  # noqa: TRY301  caught below, as every other problem is
        manifest = _parse(path.read_bytes())
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None
    if saved_as and int(saved_as[1]) != manifest.step:
        raise CheckpointError(
            f"expected step {int(saved_as[1])} in {path}, found step {manifest.step}: was the folder renamed?"
        )
    return manifest


def verify_files(
    folder: Path, files: dict[str, FileRecord], *, on_bytes: Callable[[int], object] = lambda _: None
) -> list[str]:
    """Read these files and return what is wrong with them, one line each.

    Args:
        on_bytes: called with the number of bytes read since the last call.
    """
    problems: list[str] = []
    for name, expected in files.items():
        try:
            path = safe_join(folder, name)
            size = path.stat().st_size if path.is_file() else -1
            if size < 0:
                problems.append(f"{path} is missing, or not a file")
            elif size != expected.size:
                problems.append(f"{path} has {size} bytes, but {expected.size} were written")
            elif _checksum(path, on_bytes) != expected.xxh3_128:
                problems.append(f"checksum mismatch in {path}: the file was modified or corrupted")
        except OSError as error:  # noqa: PERF203  all problems are reported at once
            problems.append(f"{folder / name} cannot be read: {error.strerror}")
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def files_to_verify(files: dict[str, FileRecord], rank: int, num_ranks: int) -> dict[str, FileRecord]:
    """The files that one rank verifies, so that each reads about as many bytes."""
    share = share_of_rank({name: record.size for name, record in files.items()}, rank, num_ranks)
    return {name: files[name] for name in share}


def share_of_rank(sizes: Mapping[str, int], rank: int, num_ranks: int) -> list[str]:
    """The names that one rank works on, so that each has about as many bytes; the same order on every rank."""
    bytes_per_rank = [0] * num_ranks
    assigned: list[str] = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        least_loaded = bytes_per_rank.index(min(bytes_per_rank))
        bytes_per_rank[least_loaded] += size
        if least_loaded == rank:
            assigned.append(name)
    return assigned


def _checksum(path: Path, on_bytes: Callable[[int], object]) -> str:
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_bytes(count)
    return digest.hexdigest()


def _parse(text: bytes) -> Manifest:
    content = json.loads(text)
    checksum = content.pop("xxh3_128")
    if content["format"] != MANIFEST_FORMAT:
        raise ValueError(f"expected format {MANIFEST_FORMAT}, found {content['format']!r}")
    if _digest(content) != checksum:
        raise ValueError("its own checksum does not match")
    del content["format"]
    files = {
        name: FileRecord(_require_count(record["size"]), str(record["xxh3_128"]))
        for name, record in content.pop("files").items()
    }
    return Manifest(
        step=_require_count(content.pop("step")),
        world_size=_require_count(content.pop("world_size")),
        layouts=_require_strings(content.pop("layouts")),
        ties={key: _require_strings(ties) for key, ties in content.pop("ties").items()},
        models=_require_strings(content.pop("models")),
        files=files,
        **_require_strings(content),
    )


def _require_count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number, found {value!r}")
    return value


def _require_strings(value: Any) -> dict[str, str]:
    if not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"expected strings, found {value!r}")
    return dict(value)


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
