"""What a complete checkpoint consists of: every file with its size and its checksum."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.metadata import inside

NAME = "manifest.json"
FORMAT = 1
CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and XXH3 checksum of one file: they find damage, not forgery."""

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, and how it was saved."""

    step: int
    world_size: int
    layouts: dict[str, str] = field(default_factory=dict)
    """How each model in it was cut, in words, by the name of its entry."""
    ties: dict[str, dict[str, str]] = field(default_factory=dict)
    """Second names of tied tensors and the first one of each, by the name of the model's entry."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    torch: str = str(torch.__version__)

    def write(self, folder: Path) -> None:
        """Write it into ``folder``, down to the disk."""
        content = {"format": FORMAT, **asdict(self)}
        with (folder / NAME).open("w") as file:
            json.dump(content | {"xxh3_128": _digest(content)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint; None for one that plain ``dcp.save`` has written.

    Raises: CheckpointError when it is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        return _parse(path.read_bytes())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None


def problems(
    folder: Path, files: dict[str, FileRecord], *, on_bytes: Callable[[int], object] = lambda _: None
) -> list[str]:
    """What is wrong with these files, one line each; all of them are read.

    Args:
        on_bytes: called with the number of bytes read since the last call.
    """
    found: list[str] = []
    for name, expected in files.items():
        try:
            path = inside(folder, name)
            size = path.stat().st_size
            if size != expected.size:
                found.append(f"{path} has {size} bytes, not the {expected.size} that were written")
            elif _checksum(path, on_bytes) != expected.xxh3_128:
                found.append(f"{path} has another checksum than when it was written: some of its bytes changed")
        except OSError as error:  # noqa: PERF203  all that is wrong is named at once
            found.append(f"{folder / name} cannot be read: {error.strerror}")
        except CheckpointError as error:
            found.append(str(error))
    return found


def share(files: dict[str, FileRecord], index: int, count: int) -> dict[str, FileRecord]:
    """The files that one of ``count`` readers checks, so that each reads about as many bytes."""
    loads = [0] * count
    mine: dict[str, FileRecord] = {}
    for name, record in sorted(files.items(), key=lambda item: (-item[1].size, item[0])):
        least = loads.index(min(loads))
        loads[least] += record.size
        if least == index:
            mine[name] = record
    return mine


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
    if content["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, found {content['format']!r}")
    if _digest(content) != checksum:
        raise ValueError("its own checksum does not fit")
    del content["format"]
    files = {str(name): FileRecord(int(it["size"]), str(it["xxh3_128"])) for name, it in content.pop("files").items()}
    manifest = Manifest(files=files, **content)
    if type(manifest.step) is not int or type(manifest.world_size) is not int:
        raise ValueError(f"expected numbers, found step {manifest.step!r} of {manifest.world_size!r} ranks")
    return manifest


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
