"""What the commands print: JSON, names that are not broken, each problem once; and how they end when interrupted."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn

from ema_dist import ShardedEMA, checkpoint
from ema_dist.checkpoint.weights.weight_writer import WeightWriter
from ema_dist.cli.terminal import SpeedColumn, format_bytes
from tests.support.cli_runs import make_checkpoint, make_dcp_checkpoint, run, run_ok
from tests.support.layouts import layouts, make_trained


def test_version() -> None:
    assert run_ok("--version").split() == ["ema-dist", importlib.metadata.version("ema-dist")]


def test_export_as_json(tmp_path: Path) -> None:
    path, _ = make_dcp_checkpoint(tmp_path / "dcp")
    result = run("export", path, tmp_path / "out", "--json", "--max-shard-size", "1KiB")
    summary = json.loads(result.stdout)
    files = {str(file): file.stat().st_size for file in (tmp_path / "out").iterdir()}
    assert len(files) > 2
    assert (summary["checkpoint"], summary["files"]) == (str(path), files)
    assert summary["notes"]
    assert all(note in result.stderr for note in summary["notes"])


def test_verify_as_json(tmp_path: Path) -> None:
    path, _ = make_dcp_checkpoint(tmp_path / "dcp")
    summary = json.loads(run_ok("verify", path, "--json"))
    assert (summary["path"], summary["problems"]) == (str(path), [])
    assert summary["tensors"] == len(json.loads(run_ok("inspect", path, "--json"))["tensors"])
    assert any("manifest" in note for note in summary["notes"])
    (path / "__0_0.distcp").unlink()
    result = run("verify", path, "--json")
    assert result.exit_code == 1
    assert re.search(r"__0_0\.distcp is missing", *json.loads(result.stdout)["problems"])


LEFT = {"same": [1.0, 1.0], "moved": [1.0, -3.0], "nan": [1.0, 1.0], "shape": [1.0], "left": [1.0]}
RIGHT = {"same": [1.0, 1.0], "moved": [1.0, -2.0], "nan": [1.0, float("nan")], "shape": [1.0, 1.0], "right": [1.0]}


def save_pair(folder: Path, left: dict[str, Any], right: dict[str, Any]) -> list[Path]:
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    for path, values in zip(paths, (left, right), strict=True):
        save_file({name: torch.tensor(value) for name, value in values.items()}, path)
    return paths


def test_diff_as_json(tmp_path: Path) -> None:
    result = run("diff", *save_pair(tmp_path, LEFT, RIGHT | {"same": [1, 1]}), "--json")
    assert result.exit_code == 1
    summary = json.loads(result.stdout)
    tensors = summary.pop("tensors")
    assert summary == {
        "equal": False,
        "only_in_a": ["left"],
        "only_in_b": ["right"],
        "shapes": {"shape": [[1], [2]]},
        "dtypes": {"same": ["float32", "int64"]},
    }
    moved = {"is_equal": False, "largest": 0.5, "mean": 0.25, "norm": pytest.approx(10**-0.5), "differs": True}
    assert tensors["moved"] == moved
    assert tensors["same"] == {"is_equal": True, "largest": 0, "mean": 0, "norm": 0, "differs": False}
    assert tensors["nan"] == {"is_equal": False, "largest": "nan", "mean": "nan", "norm": "nan", "differs": True}


@pytest.mark.parametrize(
    ("rtol", "name", "code"), [(0.4, "moved", 1), (0.5, "moved", 0), (0, "same", 0), (9, "nan", 1), (9, "shape", 1)]
)
def test_diff_within_a_tolerance(rtol: float, name: str, code: int, tmp_path: Path) -> None:
    pair = save_pair(tmp_path, {name: LEFT[name]}, {name: RIGHT[name]})
    assert run("diff", *pair, "--rtol", rtol).exit_code == code


def test_a_tolerance_admits_another_dtype(tmp_path: Path) -> None:
    path, _ = make_dcp_checkpoint(tmp_path / "dcp")
    run_ok("export", path, tmp_path / "out", "--dtype", "bfloat16")
    assert run("diff", path, tmp_path / "out").exit_code == 1
    run_ok("diff", path, tmp_path / "out", "--rtol", 0.05)
    assert run("diff", path, tmp_path / "out", "--rtol", 1e-5).exit_code == 1


@layouts("ddp", "fsdp2")
def test_names_are_in_the_order_of_the_model(layout: str, tmp_path: Path) -> None:
    """DCP's entries are in the order in which ranks wrote them."""
    model, ema = make_trained(layout)
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=1)
    if torch.distributed.get_rank() == 0:
        names = [*ema.full_shapes()]
        text = run_ok("inspect", tmp_path / "root")
        rows = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.split()]
        assert [name for name in rows if name in names] == names
        json_names = [*json.loads(run_ok("inspect", tmp_path / "root", "--json"))["tensors"]]
        assert [name.removeprefix("model.") for name in json_names if name.startswith("model.")] == names


@pytest.mark.parametrize("columns", ["60", "80"])
def test_names_are_not_broken_on_a_terminal(columns: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = ".".join(random.Random(0).choices(["encoder", "layers", "attention", "down_proj"], k=12))
    for setting, value in {"COLUMNS": columns, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}.items():
        monkeypatch.setenv(setting, value)
    model = nn.Module()
    module = model
    for part in name.split("."):
        module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter("weight", nn.Parameter(torch.ones(2, 2)))
    checkpoint.save({"model": model, "ema": ShardedEMA(model)}, tmp_path / "root", step=1)
    run_ok("export", tmp_path / "root", tmp_path / "out")
    save_file({f"{name}.weight": torch.zeros(2, 2)}, tmp_path / "zeros.safetensors")
    assert f"{name}.weight" in run_ok("inspect", tmp_path / "root")
    assert f"{name}.weight" in run("diff", tmp_path / "out", tmp_path / "zeros.safetensors").stdout


@pytest.mark.parametrize("with_manifest", ["with", "without"])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_a_truncated_file_is_one_problem(file: str, with_manifest: str, tmp_path: Path) -> None:
    if with_manifest == "with":
        root, *_ = make_checkpoint(tmp_path / "root")
        folder = root / "step-0000000003"
    else:
        folder, _ = make_dcp_checkpoint(tmp_path / "dcp")
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    result = run("verify", folder)
    assert result.exit_code == 1
    assert [file in line for line in result.stdout.splitlines()] == [True]
    assert "1 problem\n" in result.stderr


@pytest.mark.parametrize("size", [1, 1500, 3 * 2**20, 5 * 2**30, 2**45])
def test_one_unit_system(size: int) -> None:
    progress = Progress(console=Console(quiet=True))
    progress.add_task("copy", total=size)
    (task,) = progress.tasks
    task.finished_speed = size
    rendered = str(SpeedColumn().render(task))
    assert rendered == f"{format_bytes(size)}/s"
    assert re.fullmatch(r"[\d.]+ (B|[KMGT]iB)/s", rendered)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["inspect", "dcp"], 0),
        (["inspect", "dcp", "--json"], 0),
        (["diff", "dcp", "dcp", "--weights-b", "live"], 1),
        (["verify", "nowhere"], 1),
    ],
)
def test_a_reader_that_has_enough_is_no_error(arguments: list[str], code: int, tmp_path: Path) -> None:
    """The exit code is the usual one, and nothing is printed on stderr."""
    make_dcp_checkpoint(tmp_path / "dcp")
    read_end, write_end = os.pipe()
    os.close(read_end)
    stderr = write_end if code == 1 and "nowhere" in arguments else subprocess.PIPE
    command = [sys.executable, "-m", "ema_dist.cli", *arguments]
    result = subprocess.run(command, cwd=tmp_path, stdout=write_end, stderr=stderr, text=True, check=False)
    os.close(write_end)
    assert (result.returncode, result.stderr or "") == (code, "")


@pytest.mark.usefixtures("sigint_interrupts")
def test_ctrl_c_ends_an_export_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> NoReturn:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the signal raises KeyboardInterrupt")

    path, _ = make_dcp_checkpoint(tmp_path / "dcp")
    monkeypatch.setattr(WeightWriter, "add", interrupt)
    result = run("export", path, tmp_path / "new" / "out")
    assert result.exit_code == 130
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("arguments", "succeeds"), [("export --help", True), ("inspect --unknown", False)])
def test_help_may_be_read_in_part(arguments: str, succeeds: bool) -> None:  # noqa: FBT001
    """An error remains one."""
    command = f"{sys.executable} -m ema_dist.cli {arguments} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], check=False, capture_output=True, timeout=60)
    assert (ended.returncode == 0) == succeeds
