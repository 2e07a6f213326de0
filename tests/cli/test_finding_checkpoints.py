"""Which checkpoint a path stands for, whatever program named the folders, and what is said of other folders."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.cli_runs import make_checkpoint, make_dcp_checkpoint, run, run_ok, save_with_dcp


def found(path: Path, *arguments: object) -> str:
    """The checkpoint that `inspect` finds, relative to `path`."""
    return str(Path(json.loads(run_ok("inspect", path, "--json", *arguments))["path"]).relative_to(path))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_with_dcp(tmp_path / "saved", {"model": {"weight": torch.ones(2)}})


@pytest.mark.parametrize(
    ("older", "newest", "step"),
    [
        ("step-6", "step-10", 6),
        ("step-000050", "step-000200", 50),
        ("checkpoint-9/ema", "checkpoint-12/ema", 9),
        ("ep0-ba99", "ep1-ba108", 99),
        ("epoch=0-step=9.ckpt", "epoch=1-step=12.ckpt", 9),
        ("iter_0000500", "iter_0001000", 500),
        ("8", "16", 8),
    ],
)
def test_steps_are_found_by_the_number_at_the_end(
    older: str, newest: str, step: int, saved: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    for folder in (older, newest):
        shutil.copytree(saved, root / folder)
    (root / "logs").mkdir()
    (root / "step-99999").mkdir()  # a save that was interrupted: DCP has not written its .metadata
    assert found(root) == newest
    assert found(root, "--step", step) == older
    assert found(root / newest) == "."
    result = run("inspect", root, "--step", 7)
    assert result.exit_code == 1
    assert "found the complete steps" in result.stderr
    assert "1 of 1 tensors" in run_ok("diff", root, root, "--step-b", step, "--weights", "live")


def test_folders_that_save_left_behind_are_not_steps(tmp_path: Path) -> None:
    root, *_ = make_checkpoint(tmp_path / "root", step=3)
    for name in ("step-0000000004.partial", "step-0000000005.superseded2", "step-0000000006.removed"):
        shutil.copytree(root / "step-0000000003", root / name)
    assert found(root) == "step-0000000003"


def test_a_checkpoint_in_the_only_subfolder_is_found(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "checkpoint-12" / "ema")
    assert found(tmp_path / "checkpoint-12") == "ema"


@pytest.mark.parametrize("other", ["checkpoint-12/model", "step-12"])
def test_several_candidates_are_named(other: str, saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("checkpoint-12/ema", other):
        shutil.copytree(saved, root / name)
    result = run("inspect", root)
    assert result.exit_code == 1
    assert re.search(rf"\bcheckpoint-12\b.*\b{other}\b|\b{other}\b.*\bcheckpoint-12\b", result.stderr)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_files_of_weights_are_named(command: str, tmp_path: Path) -> None:
    path, _ = make_dcp_checkpoint(tmp_path / "dcp")
    run_ok("export", path, tmp_path / "out")
    for weights in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        result = run(command, weights)
        assert result.exit_code == 1
        assert re.search(r"found the file model\.safetensors; ema-dist diff", result.stderr)
