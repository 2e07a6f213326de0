"""The Python code in README.md and docs/ runs as printed, and so do the commands that go with it."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

import ema_dist
from tests.support import ROOT
from tests.support.cli_runs import run_ok

BLOCK = re.compile(r'^```python(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)

COMMAND = re.compile(r"^ema-dist .*", re.MULTILINE)


def scripts(page: Path) -> dict[str, str]:
    """Sources by name: a code block with a title is a script; all others on a page together are one script."""
    titled, untitled = {}, []
    for title, source in BLOCK.findall(page.read_text()):
        if title:
            titled[title] = source
        else:
            untitled.append(source)
    return titled | ({page.name: "\n".join(untitled)} if untitled else {})


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = [pytest.param(page.relative_to(ROOT), name, id=name) for page in PAGES for name in scripts(page)]


@pytest.mark.world_size(2)
@pytest.mark.parametrize(("page", "name"), SCRIPTS)
def test_code_in_the_documentation_runs(page: Path, name: str, tmp_path: Path) -> None:
    """A script with a title runs twice, the second time to resume; the code of a page runs once."""
    os.chdir(tmp_path)
    for port in free_ports(2 if name.endswith(".py") else 1):
        run_script(scripts(ROOT / page)[name], tmp_path / f"rank{rank()}.py", port)


@pytest.mark.world_size(2)
def test_commands_in_the_documentation_work_with_each_other(tmp_path: Path) -> None:
    """The scripts of README and quickstart run in one folder, then the commands of both."""
    pages = [ROOT / "README.md", ROOT / "docs" / "index.md"]
    sources = [source for page in pages for source in scripts(page).values() if "checkpoint" in source]
    os.chdir(tmp_path)
    for source, port in zip(sources, free_ports(len(sources)), strict=True):
        run_script(source, tmp_path / f"rank{rank()}.py", port)
    if rank() == 0:
        commands = [command for page in pages for command in COMMAND.findall(page.read_text())]
        assert len(commands) >= 5
        for command in commands:
            run_ok(*shlex.split(command, comments=True)[1:])


def test_the_reference_has_every_public_name() -> None:
    shown = re.findall(r"^::: ema_dist\.(\w+)$", (ROOT / "docs" / "api" / "index.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(ema_dist.__all__)


def run_script(source: str, path: Path, port: int) -> None:
    """Run a script, which makes its own process group, as torchrun would."""
    leave_process_group()
    path.write_text(source)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    runpy.run_path(str(path), run_name="__main__")


def rank() -> int:
    """This rank, also without a process group."""
    return int(os.environ["RANK"])


def free_ports(count: int) -> list[int]:
    """Free ports of this machine, the same on every rank."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    dist.broadcast_object_list(ports, src=0)
    return ports


def leave_process_group() -> None:
    """Destroy the process group if there is one, after a barrier: no rank may leave while another still uses it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
