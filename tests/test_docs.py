"""The Python in README.md and in the pages runs as printed."""

from __future__ import annotations

import os
import re
import runpy
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support import ROOT

BLOCK = re.compile(r'^```python(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def scripts(page: Path) -> dict[str, str]:
    """Source by name: a block with a title is a script of its own, all others on a page are one script together."""
    titled, rest = {}, []
    for title, source in BLOCK.findall(page.read_text()):
        if title:
            titled[title] = source
        else:
            rest.append(source)
    return titled | ({page.name: "\n".join(rest)} if rest else {})


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = [pytest.param(page.relative_to(ROOT), name, id=name) for page in PAGES for name in scripts(page)]


@pytest.mark.world_size(2)
@pytest.mark.parametrize(("page", "name"), SCRIPTS)
def test_code_in_the_documentation_runs(page: Path, name: str, tmp_path: Path) -> None:
    """A script of its own runs twice, as a resumed one does; a page, once."""
    script = tmp_path / f"rank{dist.get_rank()}.py"
    script.write_text(scripts(ROOT / page)[name])
    os.chdir(tmp_path)
    for port in free_ports(2 if name.endswith(".py") else 1):
        leave_process_group()
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # what torchrun would say
        runpy.run_path(str(script), run_name="__main__")


def free_ports(count: int) -> list[int]:
    """The same on every rank."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    dist.broadcast_object_list(ports, src=0)
    return ports


def leave_process_group() -> None:
    """Where there is one: together, so that no rank breaks the connection of another."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
