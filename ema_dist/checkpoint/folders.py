"""Creates output folders with their parents, and locks them against other processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Create a folder and its missing parents; at the end, remove those of them that are empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):  # the first that is not empty
            for path in made:
                path.rmdir()


@contextmanager
def folder_lock(folder: Path, *, name: Path | None = None) -> Iterator[None]:
    """Hold an advisory lock on a folder, if the file system supports it; the lock ends with the process.

    Args:
        name: the folder to name in the error, if the user did not choose ``folder``.

    Raises: BlockingIOError when another process holds the lock.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BlockingIOError(
            f"another process is writing into {name or folder}: wait until it finishes, or choose another folder"
        ) from None
    except OSError:
        pass  # some file systems, NFS among them, cannot lock folders
    try:
        yield
    finally:
        os.close(descriptor)
