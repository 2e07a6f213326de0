"""What a file by ``torch.save`` is like, before any value in it is loaded."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch


def can_be_mapped(path: Path) -> bool:
    """Whether torch can map a file by ``torch.save`` into memory: it takes the bytes of compressed entries as values.

    Raises: as `zipfile.ZipFile` for a damaged archive.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def refused_names(path: Path, message: str) -> list[str]:
    """The names of the objects in a file that torch does not load without running code.

    Args:
        message: torch's error for the file, which names one of them.
    """
    try:
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # noqa: BLE001  a damaged file, or one by an old version of torch
        return sorted(set(re.findall(r"GLOBAL (\S+) was not an allowed global", message)))
