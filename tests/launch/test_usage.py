"""How the scripts of `launch/` report what their user can correct: one line, before the first step."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distill
import train
from recipe.folders import RESULTS, claim_output_dir, new_run_id, require_checkpoint_dir
from recipe.parallelism import require_gpu
from recipe.script import UsageError
from tests.support import LAUNCH
from tests.support.injected_signals import TORCHRUN


def test_wrong_options_under_torchrun_are_one_line_which_its_report_repeats() -> None:
    command = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", LAUNCH / "train.py", "--epochs", "0")
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert completed.returncode == 1
    (line,) = re.findall(r"^train\.py: error: .*$", completed.stderr, re.MULTILINE)
    assert re.search(r"--epochs\b.*\b1\b.*'0'", line)
    assert re.search(r"Root Cause.*error: argument --epochs", completed.stderr, re.DOTALL)
    assert completed.stderr.count("Traceback") == 1, "of torchrun itself only"


def test_a_script_alone_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    command = (sys.executable, LAUNCH / "evaluate_weights.py", tmp_path / "absent.safetensors")
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert completed.returncode == 2
    assert completed.stdout == ""
    assert re.fullmatch(r"evaluate_weights\.py: error: .*absent\.safetensors.*\n", completed.stderr)


def test_help_shows_the_defaults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for script, defaults in ((train, (60, 24, 48, 0.002, "runs/digits")), (distill, (20.0, 96, 0.3))):
        monkeypatch.setattr(sys, "argv", ["script", "--help"])
        with pytest.raises(SystemExit):
            script.parse_arguments()
        text = " ".join(capsys.readouterr().out.split())
        assert [f"(default: {value})" in text for value in defaults] == [True] * len(defaults)
        assert "None" not in text
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(SystemExit):
            script.parse_arguments()
        monkeypatch.delenv("LOCAL_RANK")
        assert capsys.readouterr().out == "", "torchrun shows the output of all ranks"


@pytest.mark.parametrize(("ranks", "gpus"), [(1, 0), (2, 1)])
def test_fewer_gpus_than_ranks_are_refused(ranks: int, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UsageError, match=rf"ranks.*\b{ranks}\b.*GPUs.*\b{gpus}\b.*--device cpu"):
        require_gpu()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: ranks)
    require_gpu()


@pytest.mark.world_size(2)
def test_a_folder_that_cannot_be_written_is_refused_on_every_rank(tmp_path: Path) -> None:
    """A folder inside a file: root, who may write everywhere, cannot create it either."""
    rank = dist.get_rank()
    if rank == 0:
        (tmp_path / "file").touch()
    dist.barrier()
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path}/file/results")):
        claim_output_dir(tmp_path / "file/results", new_run_id(), option="--output-dir")
    one_rank_only = tmp_path / ("file/checkpoints" if rank == 1 else "checkpoints")
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path}/file/checkpoints")):
        require_checkpoint_dir(one_rank_only, option="--checkpoint-dir")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("result", RESULTS)
def test_results_of_another_run_are_not_replaced(result: str, tmp_path: Path) -> None:
    stopped, finished = new_run_id(), new_run_id()
    claim_output_dir(tmp_path, stopped, option="--output-dir")  # a run that left no results does not keep the folder
    claim_output_dir(tmp_path, finished, option="--output-dir")
    if dist.get_rank() == 0:
        (tmp_path / result).touch()
    claim_output_dir(tmp_path, finished, option="--output-dir")
    with pytest.raises(UsageError, match=re.escape(result)):
        claim_output_dir(tmp_path, new_run_id(), option="--output-dir")
