"""The scripts that docs/transformers.md and docs/accelerate.md print, and `launch/train_transformers.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers: tox -e frameworks")

import torch.distributed as dist
from safetensors.torch import load_file

from tests.support import LAUNCH, ROOT
from tests.support.injected_signals import TORCHRUN
from tests.support.transformers_runs import ignored_warnings, start_accelerate

EXAMPLE = re.compile(r'^```py title="train.py"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def run_example(page: str, folder: Path, *, steps: str, more_steps: str) -> list[str]:
    """Run the script of a page twice on this rank, longer the second time; returns the last line of each run."""
    (code,) = EXAMPLE.findall((ROOT / "docs" / page).read_text())
    assert steps in code
    os.chdir(folder)
    last_lines = []
    for code_of_run in (code, code.replace(steps, more_steps)):
        start_accelerate("ddp")
        with redirect_stdout(StringIO()) as output, ignored_warnings():
            exec(compile(code_of_run, page, "exec"), {"__name__": "__main__"})
        dist.barrier()
        last_lines.append(output.getvalue().strip().split("\n")[-1])
    return last_lines


@pytest.mark.world_size(2, timeout=120)
def test_the_script_for_the_trainer(tmp_path: Path) -> None:
    lines = run_example("transformers.md", tmp_path, steps="max_steps=80", more_steps="max_steps=100")
    if dist.get_rank() == 0:
        for line in lines:
            step, average, live = re.findall(r"[\d.]*\d", line)
            assert (tmp_path / "checkpoints" / f"checkpoint-{step}" / "ema").is_dir()
            assert float(average) != float(live)
        assert (tmp_path / "checkpoints" / "checkpoint-100").is_dir()


@pytest.mark.world_size(2, timeout=120)
def test_the_script_for_accelerate(tmp_path: Path) -> None:
    lines = run_example("accelerate.md", tmp_path, steps="range(4)", more_steps="range(2)")
    if dist.get_rank() == 0:
        assert [re.match(r"step (\d+): accuracy of the averages [89]\d", line)[1] for line in lines] == ["32", "48"]
        names = load_file(tmp_path / "averaged" / "model.safetensors").keys()
        assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_the_launch_script_resumes_and_exports_the_averages(tmp_path: Path) -> None:
    """On two ranks by torchrun, and then in one process."""
    two_ranks = (*TORCHRUN, "--standalone", "--nproc-per-node", "2")
    outputs = []
    for launcher, options in ((two_ranks, ("--steps", "20")), ((sys.executable,), ("--steps", "30", "--resume"))):
        script = (LAUNCH / "train_transformers.py", "--device", "cpu", "--output-dir", tmp_path, "--save-steps", "10")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        completed = subprocess.run(
            (*launcher, *script, *options), capture_output=True, text=True, env=environment, timeout=300, check=False
        )
        assert completed.returncode == 0, completed.stdout + completed.stderr
        outputs.append(completed.stdout)
    losses = re.findall(r"^step (\d+): average loss ([\d.]+)$", "".join(outputs), re.MULTILINE)
    assert [step for step, _ in losses] == ["10", "20", "30"]
    final = re.search(r"^30 steps: live loss ([\d.]+), average loss ([\d.]+);", outputs[-1], re.MULTILINE)
    assert final is not None
    assert final[2] == losses[-1][1] != final[1]
    assert (tmp_path / "averaged" / "model.safetensors").is_file()
