"""Builds shared libraries with the machine's C compiler, and caches them between runs."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

from ema_dist.kernels.kernel import UnsupportedKernelError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

_log = logging.getLogger(__name__)

DIGEST_BYTES = sha256().digest_size

COMPILER_SECONDS = 120.0
"""After this time the compiler counts as broken."""

LOCK_SECONDS = 30.0
"""How long a process waits for another one that is compiling; after that it compiles, too."""

CPU_FIELDS = {"vendor_id", "cpu family", "model", "model name", "stepping", "flags", "cpu", "isa"}
CPU_FIELDS |= {"Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part"}
"""Fields of /proc/cpuinfo that determine which instructions ``-march=native`` uses."""


def load_library(source: Path, *, compiler: str, flags: Sequence[str]) -> ctypes.CDLL:
    """The library that ``compiler`` builds from ``source``, from the cache if it was built before.

    A cache entry is valid for one combination of source, flags, compiler version and machine. It is read only if no
    other user can write to it. If the cache cannot be used, a warning is logged, and every process compiles.

    Raises: UnsupportedKernelError when the compiler fails, or the library cannot be loaded.
    """
    command = (*compiler.split(), *flags)
    key = _cache_key(source, command)
    try:
        path = _cache_folder() / f"{source.stem}-{key}"
    except (OSError, RuntimeError) as problem:  # Path.home() raises RuntimeError if there is no home folder
        _log.warning("compiled kernels are not cached: %s", problem)
        return _load_compiled(_compile(source, command), compiler)
    if library := _load_cached(path, key):
        return library
    with _lock(path.parent):
        if library := _load_cached(path, key):  # another process has compiled it meanwhile
            return library
        content = _compile(source, command)
        try:
            _write(path, _digest(key, content) + content)
        except OSError as problem:
            _log.warning("compiled kernels are not cached: %s", problem)
    return _load_compiled(content, compiler)


def _load_compiled(content: bytes, compiler: str) -> ctypes.CDLL:
    try:
        return _load(content)
    except OSError as error:
        raise UnsupportedKernelError(f"the library that {compiler} built cannot be loaded: {error}") from error


def _compile(source: Path, command: Sequence[str]) -> bytes:
    try:
        with TemporaryDirectory() as folder:
            output = Path(folder, "library.so")
            _run([*command, str(source), "-o", str(output), "-lm"]).check_returncode()
            return output.read_bytes()
    except (OSError, subprocess.SubprocessError) as error:
        raise UnsupportedKernelError(f"{' '.join(command)} failed: {getattr(error, 'stderr', '') or error}") from error


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, capture_output=True, text=True, errors="replace", timeout=COMPILER_SECONDS
    )


def _load(content: bytes) -> ctypes.CDLL:
    """Load a library from a private copy, so that nobody can change it after its checksum was compared."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "library.so")
        path.write_bytes(content)
        return ctypes.CDLL(str(path))


def _load_cached(path: Path, key: str) -> ctypes.CDLL | None:
    """The library in the cache; None if there is none. An entry that cannot be used is removed."""
    try:
        return _load(_read(path, key))
    except FileNotFoundError:
        return None
    except OSError as problem:
        _log.warning("a cached kernel cannot be used and is compiled again: %s", problem)
        with suppress(OSError):
            path.unlink()
        return None


def _read(path: Path, key: str) -> bytes:
    """The library in a file of the cache. Raises: OSError when others could have written it, or it is corrupted."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        _require_private(path, os.fstat(file.fileno()))
        digest, content = file.read(DIGEST_BYTES), file.read()
    if digest != _digest(key, content):
        raise OSError(f"checksum mismatch in {path}: the file was modified or corrupted")
    return content


def _write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name first, so that readers find a complete file or none."""
    with NamedTemporaryFile(dir=path.parent, prefix="writing-", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _cache_folder() -> Path:
    """The folder of the cache, which is made if it does not exist.

    Raises: OSError when it cannot be made, when other users can write to it, or when this system does not tell whether
        they can; RuntimeError when there is no home folder.
    """
    if fcntl is None:
        raise OSError("this system has no POSIX permissions, so other users might be able to write to the cache")
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (cache_home if cache_home.is_absolute() else Path.home() / ".cache") / "ema_dist"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(folder, folder.lstat())
    return folder


def _require_private(path: Path, status: os.stat_result) -> None:
    """Raise PermissionError if users other than this one can write to a file or folder, or if it is a link."""
    is_ours = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not is_ours or stat.S_ISLNK(status.st_mode):
        raise PermissionError(
            f"expected {path} to be writable by user {os.geteuid()} only, found {stat.filemode(status.st_mode)} of "
            f"user {status.st_uid}: remove it"
        )


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold an advisory lock, so that ranks that start together compile once; a process that ends releases it."""
    with ExitStack() as stack:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            deadline = time.monotonic() + LOCK_SECONDS
            while not _try_lock(descriptor) and time.monotonic() < deadline:
                time.sleep(0.05)
        yield


def _try_lock(descriptor: int) -> bool:
    """Raises: OSError on file systems that cannot lock folders, NFS among them."""
    assert fcntl is not None  # else there is no cache
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _digest(key: str, content: bytes) -> bytes:
    """A checksum that includes the key, so that an entry stored under another entry's name is detected."""
    return sha256(key.encode() + content).digest()


def _cache_key(source: Path, command: Sequence[str]) -> str:
    compiler = shutil.which(command[0]) or command[0]
    parts = (source.read_text(), *command, compiler, _compiler_version(tuple(command)), _machine())
    return sha256("\0".join(parts).encode()).hexdigest()[:32]


@cache
def _compiler_version(command: tuple[str, ...]) -> str:
    try:
        answer = _run([*command, "--version"])
    except (OSError, subprocess.SubprocessError) as error:
        raise UnsupportedKernelError(f"{' '.join(command)} failed: {error}") from error
    return answer.stdout + answer.stderr


@cache
def _machine() -> str:
    """The processor and the C library; if the processor is unknown, the name of the host."""
    parts = {platform.machine(), *platform.libc_ver()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "\n".join(sorted({*parts, platform.node()}))
    return "\n".join(sorted(parts | {line for line in lines if line.partition(":")[0].strip() in CPU_FIELDS}))
