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

from ema_dist.checkpoint.dcp.metadata import inside
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.folders import COMPLETE, sync

NAME = "manifest.json"
FORMAT = 1
CHUNK_BYTES = 2**20


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
    models: dict[str, str] = field(default_factory=dict)
    """The entry of the model whose averages an entry holds, by the name of the latter."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    torch: str = str(torch.__version__)

    def write(self, folder: Path) -> None:
        """Write it into ``folder``, down to the disk."""
        content = {"format": FORMAT, **asdict(self)}
        (folder / NAME).write_text(json.dumps(content | {"xxh3_128": _digest(content)}, indent=1))
        sync(folder / NAME)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint; None for one that plain ``dcp.save`` has written.

    Raises: CheckpointError when it is damaged, or missing in a folder that `save` has named, or of another step.
    """
    path = inside(folder, NAME)
    saved_as = COMPLETE.fullmatch(folder.resolve().name)
    if not os.path.lexists(path):
        if saved_as:
            raise CheckpointError(f"{path} is missing: it was there when {folder.name} got its name")
        return None
    try:
        if not path.is_file():
            raise ValueError("it is not a file")  # noqa: TRY301  and everything else is caught here
        manifest = _parse(path.read_bytes())
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None
    if saved_as and int(saved_as[1]) != manifest.step:
        raise CheckpointError(f"{folder} was renamed: {NAME} in it is of step {manifest.step}")
    return manifest


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
            size = path.stat().st_size if path.is_file() else -1
            if size < 0:
                found.append(f"{path} is missing, or not a file")
            elif size != expected.size:
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
    files = {name: FileRecord(_whole(it["size"]), str(it["xxh3_128"])) for name, it in content.pop("files").items()}
    return Manifest(
        step=_whole(content.pop("step")),
        world_size=_whole(content.pop("world_size")),
        layouts=_texts(content.pop("layouts")),
        ties={key: _texts(ties) for key, ties in content.pop("ties").items()},
        models=_texts(content.pop("models")),
        files=files,
        **_texts(content),
    )


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number, found {value!r}")
    return value


def _texts(value: Any) -> dict[str, str]:
    if not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"expected texts, found {value!r}")
    return dict(value)


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
