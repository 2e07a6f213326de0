"""`ema-dist merge`: what it prints and writes, and what wrong input ends with."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ema_dist import checkpoint
from tests.support.cli_runs import load_exported, make_checkpoint, run, run_ok, save_with_dcp
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four checkpoints of a layer whose weights are all 0, 1, 2 and 3."""
    for step in range(4):
        model = nn.Linear(3, 2)
        for parameter in model.parameters():
            nn.init.constant_(parameter, step)
        checkpoint.save({"model": model}, tmp_path / "root", step=step, keep=None)
    return tmp_path / "root"


def merged_value(folder: Path) -> float:
    (value,) = {element for tensor in load_exported(folder).values() for element in tensor.flatten().tolist()}
    return value


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), 1.5),
        (("--last", 2), 2.5),
        (("--coefficients", "0.1,0.2,0.3,0.4"), 2.0),
        (("--emulate-decay", "linear"), 1.5),
        (("--emulate-decay", "1-sqrt"), 3 - 0.5**0.5 - 0.25**0.5 - 0.75**0.5),
        (("--emulate-decay", "cosine"), 1.5),
    ],
)
def test_coefficients_are_printed_and_applied(options: tuple[object, ...], expected: float, root: Path) -> None:
    out = run_ok("merge", root, "-o", root.parent / "out", *options)
    assert merged_value(root.parent / "out") == pytest.approx(expected)
    sources = json.loads((root.parent / "out" / "merge.json").read_text())["sources"]
    printed = re.findall(r"^\s*(\d+)\s+(-?\d\.\d{6})\s+(\S+)", out, re.MULTILINE)
    assert printed == [(str(s["step"]), f"{s['coefficient']:.6f}", s["path"]) for s in sources]


def test_json_has_the_sources_and_the_files(root: Path) -> None:
    out = root.parent / "out"
    printed = json.loads(run_ok("merge", root, "-o", out, "--json"))
    assert printed["sources"] == json.loads((out / "merge.json").read_text())["sources"]
    assert printed["files"] == {str(path): path.stat().st_size for path in sorted(out.iterdir())}


def test_a_dtype_and_averages_can_be_chosen(tmp_path: Path) -> None:
    root, _, ema = make_checkpoint(tmp_path / "root")
    run_ok("merge", root, "-o", tmp_path / "out", "--weights", "ema", "--dtype", "bfloat16")
    merged = load_exported(tmp_path / "out")
    assert all(torch.equal(merged[name], full) for name, full in ema.full_state_dict(dtype=torch.bfloat16).items())


def other_model(names: dict[str, Tensor], folder: Path) -> Path:
    save_file(names, folder / "other.safetensors")
    return folder / "other.safetensors"


@pytest.mark.parametrize(
    ("options", "exit_code", "expected"),
    [
        (("--coefficients", "0.5,0.5"), 1, r"4 coefficients.*got 2"),
        (("--coefficients", "0.5,0.5,0.5,0.5"), 1, r"1e-06.*sum is 2\b"),
        (("--coefficients", "a,b"), 2, "'a,b'"),
        (("--coefficients", "1", "--emulate-decay", "linear"), 2, "--coefficients.*--emulate-decay"),
        (("--last", 5), 1, r"between 1 and 4.*got 5"),
        (("--weights", "ema"), 1, r"averages.*step-0000000000"),
        (("--max-shard-size", "0"), 2, "max_shard_size"),
    ],
)
def test_wrong_options_are_errors_and_write_nothing(
    options: tuple[object, ...], exit_code: int, expected: str, root: Path
) -> None:
    result = run("merge", root, "-o", root.parent / "out", *options)
    assert result.exit_code == exit_code
    assert re.search(expected, re.sub(r"[│╭╰─╮╯\s]+", " ", result.stderr))
    assert [path.name for path in root.parent.iterdir()] == ["root"]


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"weight": torch.ones(2, 3), "scale": torch.ones(2)}, r"only .*other.* has scale; only .*root.* has bias"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, r"shapes of 1 .*weight \[3, 2\] and \[2, 3\]"),
        (
            {"weight": torch.ones(2, 3), "bias": torch.ones(2).long()},
            r"categories.* 1 .*bias torch\.int64 and",
        ),
    ],
)
def test_different_models_are_rejected(tensors: dict[str, Tensor], expected: str, root: Path) -> None:
    other = other_model(tensors, root.parent)
    result = run("merge", root, other, "-o", root.parent / "out")
    assert result.exit_code == 1
    assert re.search(expected, result.stderr)
    assert not (root.parent / "out").exists()


def test_many_different_names_are_abbreviated(root: Path) -> None:
    other = other_model({f"layers.{number}": torch.ones(1) for number in range(50)}, root.parent)
    result = run("merge", root, other, "-o", root.parent / "out")
    assert re.search(r"layers\.0\b.*45 more", result.stderr)


def test_averages_without_a_model_have_no_live_weights(tmp_path: Path) -> None:
    _, _, ema = make_checkpoint(tmp_path / "root")
    only_averages = save_with_dcp(tmp_path / "averages", {"ema": ema})
    result = run("merge", only_averages, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert re.search(r"a model in .*averages.*found averages 'ema'", result.stderr)


def test_an_output_that_exists_is_left_alone(root: Path) -> None:
    (root.parent / "out").mkdir()
    result = run("merge", root, "-o", root.parent / "out")
    assert (result.exit_code, [*(root.parent / "out").iterdir()]) == (1, [])
    assert "exists" in result.stderr


@pytest.mark.parametrize("file_format", ["safetensors", "dcp"])
@pytest.mark.parametrize(("signal_number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_merge_and_leaves_nothing(
    signal_number: int, exit_code: int, file_format: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> bool:
        signal.raise_signal(signal_number)
        return True

    monkeypatch.setattr("ema_dist.checkpoint.weighted_sum.weighted_sum.add_scaled_", interrupted)
    (root.parent / ".out.partial").mkdir()  # of a process that was killed
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    try:
        result = run("merge", root, "-o", root.parent / "out", "--format", file_format)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert result.exit_code == exit_code, result.output
    assert [path.name for path in root.parent.iterdir()] == ["root"]


def test_torchrun_shares_the_work(root: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ema_dist.cli", "merge"]
    command += [str(root), "-o", str(root.parent / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert merged_value(root.parent / "out") == 1.5
    assert len([*(root.parent / "out").glob("model-*.safetensors")]) == 2
