"""What docs/promises.md says about networks, threads, logging and platforms."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from ema_dist import HalfLife, ShardedEMA, checkpoint
from tests.support.layouts import assert_bitwise_equal, evaluate, make_trained

EVERYTHING_WITHOUT_SOCKETS = """
import sys

def refuse_network(event, arguments):
    if event.startswith("socket.") and event not in ("socket.gethostname",):
        raise AssertionError(f"{event} {arguments}")

sys.addaudithook(refuse_network)
import torch
from typer.testing import CliRunner
from ema_dist import HalfLife, ShardedEMA, checkpoint
from ema_dist.cli.app import app

model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
ema = ShardedEMA(model, decay=HalfLife(1))
for _ in range(5):
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    ema.update()
with ema.swapped(), torch.no_grad():
    model(torch.ones(4))
checkpoint.save({"model": model, "optim": optimizer, "ema": ema}, "root", step=5)
checkpoint.load({"model": model, "optim": optimizer, "ema": ema}, "root")
checkpoint.gather(ema, "gathered")
checkpoint.scatter(ema, "gathered")
for command in (["inspect", "root"], ["verify", "root"], ["export", "root", "out"], ["diff", "root", "out"]):
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
print("done")
"""

NOT_LINUX = """
import sys
sys.modules["fcntl"] = None  # as on Windows: importing it raises ImportError
import os, torch
from ema_dist import HalfLife, ShardedEMA, checkpoint

model = torch.nn.Linear(4, 4)
ema = ShardedEMA(model, decay=HalfLife(1))
with torch.no_grad():
    model.weight.fill_(1)
for _ in range(5):
    ema.update()
with ema.swapped():
    assert 0.9 < model.weight.min() < 1
checkpoint.gather(ema, "gathered")
print("done")
"""


def run_python(code: str, folder: Path) -> str:
    """The output of a program that must succeed."""
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_one_process_opens_no_socket(tmp_path: Path) -> None:
    assert run_python(EVERYTHING_WITHOUT_SOCKETS, tmp_path).endswith("done\n")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_ranks_open_no_socket_beside_the_process_group(layout: str, tmp_path: Path) -> None:
    """The process group of torch communicates without Python's sockets."""
    model, ema = make_trained(layout, decay=HalfLife(0.75))
    events: list[str] = []
    # A hook cannot be removed; this process runs no other test.
    sys.addaudithook(lambda event, _: events.append(event) if event.startswith("socket.") else None)
    ema.update()
    with ema.swapped(), torch.no_grad():
        evaluate(model)
    with ema.serving(), torch.no_grad():
        evaluate(model)
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=4)
    checkpoint.load({"model": model, "ema": ema}, tmp_path / "root")
    checkpoint.gather(ema, tmp_path / "gathered")
    checkpoint.scatter(ema, tmp_path / "gathered")
    assert {*events} <= {"socket.gethostname"}


def test_averages_work_without_modules_that_only_posix_systems_have(tmp_path: Path) -> None:
    assert run_python(NOT_LINUX, tmp_path).endswith("done\n")


@pytest.mark.world_size(1)
def test_updates_go_on_during_a_save_in_the_background(tmp_path: Path) -> None:
    model, ema = make_trained("plain", decay=HalfLife(0.75))
    saved = ema.full_state_dict()
    checkpoint.save({"ema": ema}, tmp_path, step=3, block=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    ema.update()
    checkpoint.wait()
    checkpoint.load({"ema": ema}, tmp_path)
    assert_bitwise_equal(ema.full_state_dict(), saved)


def test_forward_passes_in_other_threads_see_the_averages_that_are_served() -> None:
    model = nn.Linear(4, 4, bias=False)
    ema = ShardedEMA(model, decay=HalfLife(1))
    with torch.no_grad():
        model.weight.fill_(1)
    for _ in range(5):
        ema.update()
    average, inputs = ema.full_state_dict()["weight"], torch.eye(4)
    with ema.serving(), ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: model(inputs).detach(), range(16)))
    assert all(torch.allclose(output, average.T) for output in outputs)


def test_the_package_logs_to_one_logger_that_prints_nothing_by_itself(tmp_path: Path) -> None:
    code = "import logging, ema_dist; logging.getLogger('ema_dist.anything').error('not printed'); print('done')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("done\n", "")
