"""Compiled kernels are cached between runs, by source, compiler and machine, and only where nobody else can write."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from ema_dist.kernels import c_kernel, library_cache
from tests.support.fake_compiler import FakeCompiler


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCompiler]:
    """An empty cache, and a compiler that counts its runs."""
    yield FakeCompiler(tmp_path, monkeypatch)
    FakeCompiler.restart()


def test_it_is_compiled_once_for_all_processes(compiler: FakeCompiler) -> None:
    for _ in range(3):
        compiler.use()
    assert compiler.runs == 1
    assert [path.stat().st_mode & 0o777 for path in (compiler.cache, *compiler.entries)] == [0o700, 0o600]


@pytest.mark.parametrize("changed", ["source", "flags", "compiler", "machine"])
def test_another_source_compiler_or_machine_has_another_entry(
    changed: str, compiler: FakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.use()
    match changed:
        case "source":
            (tmp_path / "c_kernel.c").write_text(f"{c_kernel.SOURCE.read_text()}\n")
            monkeypatch.setattr(c_kernel, "SOURCE", tmp_path / "c_kernel.c")
        case "flags":
            monkeypatch.setattr(c_kernel, "COMPILER_FLAGS", ("-g", *c_kernel.COMPILER_FLAGS))
        case "compiler":
            compiler.set_version("2")
        case "machine":
            monkeypatch.setattr(library_cache, "_machine", lambda: "another processor")
    compiler.use()
    assert (compiler.runs, len(compiler.entries)) == (2, 2)


@pytest.mark.world_size(3)
@pytest.mark.parametrize("can_lock", [True, False])
def test_processes_that_start_together(can_lock: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """They compile once; where files cannot be locked each compiles, and none sees a part of a library."""

    def refuse(_: int) -> bool:
        raise OSError("No locks available")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            FakeCompiler(tmp_path, patch, seconds=0.5)
        dist.barrier()
        if not can_lock:
            patch.setattr(library_cache, "_try_lock", refuse)
        compiler = FakeCompiler(tmp_path, patch, seconds=0.5)
        dist.barrier()
        compiler.use()
        dist.barrier()
        compiler.use()
        assert compiler.runs == (1 if can_lock else 3)
        assert len(compiler.entries) == 1


def test_a_process_that_holds_the_lock_too_long_is_not_waited_for(
    compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_cache, "LOCK_SECONDS", 0.1)
    monkeypatch.setattr(library_cache, "_try_lock", lambda _: False)
    compiler.use()
    assert compiler.runs == 1


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": _cut,
    "empty": lambda path: path.write_bytes(b""),
    "modified": _flip,
    "writable by the group": lambda path: path.chmod(0o620),
    "writable by all": lambda path: path.chmod(0o602),
    "a link": _link,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_unsafe_entry_is_compiled_again(
    damage: str, compiler: FakeCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.use()
    (entry,) = compiler.entries
    DAMAGES[damage](entry)
    compiler.use()
    assert str(entry) in caplog.text
    assert compiler.runs == 2
    assert entry.stat().st_mode & 0o777 == 0o600
    compiler.use()
    assert compiler.runs == 2


def test_an_entry_under_the_name_of_another_is_compiled_again(compiler: FakeCompiler) -> None:
    compiler.use()
    (first,) = compiler.entries
    compiler.set_version("2")
    compiler.use()
    (second,) = {*compiler.entries} - {first}
    second.replace(first)
    compiler.set_version("1")
    compiler.use()
    assert compiler.runs == 3


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_to_is_not_used(
    mode: int, compiler: FakeCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.cache.mkdir(parents=True)
    compiler.cache.chmod(mode)
    compiler.use()
    compiler.use()
    assert str(compiler.cache) in caplog.text
    assert (compiler.runs, compiler.entries) == (2, [])


def test_a_folder_of_another_user_is_not_used(
    compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.use()
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    compiler.use()
    assert compiler.runs == 2
    assert f"user {own + 1} only" in caplog.text


def test_a_folder_that_is_a_link_is_not_used(compiler: FakeCompiler, tmp_path: Path) -> None:
    compiler.cache.parent.mkdir()
    compiler.cache.symlink_to(tmp_path, target_is_directory=True)
    compiler.use()
    compiler.use()
    assert compiler.runs == 2


@pytest.mark.parametrize("home", ["/dev/null", "/proc"])
def test_where_no_folder_can_be_made_it_is_compiled_by_each_process(
    home: str, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without ``XDG_CACHE_HOME`` the cache is in the home."""
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", home)
    compiler.use()
    compiler.use()
    assert compiler.runs == 2
    assert f"{home}/.cache" in caplog.text


def test_where_nothing_can_be_written_it_still_works(
    compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(library_cache, "_write", fail)
    compiler.use()
    assert "No space left" in caplog.text
    assert (compiler.runs, compiler.entries) == (1, [])
