"""The scripts of docs/lightning.md and `launch/train_lightning.py`, started by torchrun and by Lightning's launcher."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import LAUNCH, ROOT
from tests.support.injected_signals import TORCHRUN

pytest.importorskip("lightning", reason="needs lightning: tox -e frameworks")

SCRIPT = LAUNCH / "train_lightning.py"
TWO_RANKS = (*TORCHRUN, "--standalone", "--nproc-per-node", "2")
EXAMPLES = re.compile(r'^```py title="(\w+\.py)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
SCORES = re.compile(r"^(epoch .*): average loss [\d.]+, accuracy [\d.]+%$", re.MULTILINE)


def output_of(*command: str | Path, folder: Path) -> str:
    """Runs a command, which must succeed, and returns all that it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    completed = subprocess.run(command, **streams, text=True, env=environment, cwd=folder, timeout=300, check=False)
    assert completed.returncode == 0, completed.stdout
    return completed.stdout


def test_the_scripts_of_the_page_run_and_resume(tmp_path: Path) -> None:
    page = dict(EXAMPLES.findall((ROOT / "docs" / "lightning.md").read_text()))
    for name, longer, counts in (
        ("train.py", ("max_epochs=4", "max_epochs=6"), (64, 96)),
        ("train_fabric.py", ("range(2)", "range(2)"), (32, 64)),
    ):
        folder = tmp_path / name.removesuffix(".py")
        folder.mkdir()
        for text, count in zip((page[name], page[name].replace(*longer)), counts, strict=True):
            (folder / name).write_text(text)
            assert f"{count} steps, accuracy of the averages" in output_of(*TWO_RANKS, name, folder=folder)


def test_the_launch_script_resumes_a_sharded_checkpoint_with_lightnings_launcher(tmp_path: Path) -> None:
    options = (SCRIPT, "--device", "cpu", "--parallel", "fsdp2", "--epochs", "2", "--save-folder")
    scores = SCORES.findall(output_of(*TWO_RANKS, *options, tmp_path / "whole", folder=tmp_path))
    assert scores == ["epoch 1, step 27", "epoch 2, step 54"]
    shutil.copytree(tmp_path / "whole" / "epoch=0.ckpt", tmp_path / "resumed" / "last.ckpt")
    command = (sys.executable, *options, tmp_path / "resumed", "--resume", "--ranks", "2")
    resumed = output_of(*command, folder=tmp_path)
    assert "starting at step 27" in resumed
    assert SCORES.findall(resumed) == ["epoch 2, step 54"]
