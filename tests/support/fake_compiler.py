"""A C compiler that counts its runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from ema_dist.kernels import c_kernel, library_cache, make_kernel, selection

SCRIPT = """#!/bin/sh
case "$*" in *--version*) echo {version}; exit;; esac
echo run >> {log}
sleep {seconds}
exec {compiler} "$@"
"""


class FakeCompiler:
    """Wraps the machine's C compiler and sets ``CC``; the cache is empty, and this process has compiled nothing."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, *, seconds: float = 0) -> None:
        self._path, self._log, self._seconds = folder / "fake-cc", folder / "runs", seconds
        self.cache = folder / "cache" / "ema_dist"
        self._compiler = shutil.which("cc")
        assert self._compiler, "the tests of compiled kernels need a C compiler"
        self.set_version("1")
        patch.setenv("CC", str(self._path))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        self.restart()

    def set_version(self, version: str) -> None:
        """Set the answer to ``--version``."""
        script = SCRIPT.format(version=version, log=self._log, seconds=self._seconds, compiler=self._compiler)
        new = self._path.with_name(f"{self._path.name}-{version}-{os.getpid()}")  # several ranks write it at once
        new.write_text(script)
        new.chmod(0o700)
        new.replace(self._path)

    @staticmethod
    def restart() -> None:
        """Forget what this process has compiled and measured."""
        for remembered in (c_kernel._compile, library_cache._compiler_version, selection._fastest):  # noqa: SLF001
            remembered.cache_clear()

    @property
    def runs(self) -> int:
        """How many times it has compiled."""
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0

    @property
    def entries(self) -> list[Path]:
        """The files in the cache."""
        return sorted(self.cache.iterdir()) if self.cache.exists() else []

    def use(self) -> None:
        """Update an average with the compiled kernel, as a newly started process would."""
        self.restart()
        averages = [torch.zeros(3)]
        lerp = make_kernel([averages], [torch.ones(3)], kernel="compiled")
        assert lerp.name == "compiled"
        lerp([0.25])
        assert averages[0].tolist() == [0.25] * 3


def prefer(patch: pytest.MonkeyPatch, name: str) -> None:
    """Make measurements find that the kernel ``name`` is the fastest."""
    patch.setattr(selection, "_seconds", lambda lerp, *_: float(lerp.name != name))
    selection._fastest.cache_clear()  # noqa: SLF001
