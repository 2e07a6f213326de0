"""The Python code in README.md and docs/ runs as printed."""

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
    script = tmp_path / f"rank{dist.get_rank()}.py"
    script.write_text(scripts(ROOT / page)[name])
    os.chdir(tmp_path)
    for port in free_ports(2 if name.endswith(".py") else 1):
        leave_process_group()
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # torchrun would set these
        runpy.run_path(str(script), run_name="__main__")


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
