"""The scripts of `launch/`, run as their users run them."""

from __future__ import annotations

import ast
import math
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ema_dist import ShardedEMA, checkpoint
from launch.recipe.averaging_laws import LAWS, make_law
from launch.recipe.script import UsageError
from tests.stress_restarts import KILL_POINTS
from tests.support import LAUNCH, ROOT
from tests.support.injected_signals import TORCHRUN, TRAIN_WITH_SIGNALS, InjectedSignal, differences, read_metrics


def output_of(*commands: tuple[str | Path, ...], environment: dict[str, str] | None = None) -> str:
    """Runs the commands at the same time, which must succeed, and returns all that they print."""
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (output, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output + errors
    return "".join(output for output, _ in outputs)


def train_command(directory: Path, *options: str) -> tuple[str | Path, ...]:
    """The script with options for two epochs, and with all its output in `directory`."""
    folders = ("--output-dir", directory, "--checkpoint-dir", directory / "checkpoints")
    return (LAUNCH / "train.py", "--device", "cpu", "--epochs", "2", *folders, *options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run on two ranks that ended undisturbed."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, output_of((*TORCHRUN, "--standalone", "--nproc-per-node", "2", *train_command(directory)))


def test_a_run_reports_each_epoch_and_leaves_metrics_and_curves(finished: tuple[Path, str]) -> None:
    directory, output = finished
    rows = read_metrics(directory)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        assert f"{float(row['live_loss']):.4f}" in output
        assert f"{float(row['average_accuracy']):.2%}" in output
    assert "\x1b" not in output, "control codes where there is no terminal"
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_plain_script_evaluates_the_averaged_model_to_what_the_run_printed(finished: tuple[Path, str]) -> None:
    directory, output = finished
    evaluated = output_of((sys.executable, LAUNCH / "evaluate_weights.py", directory / "model.safetensors"))
    last = read_metrics(directory)[-1]
    expected = f"loss {float(last['average_loss']):.4f}, accuracy {float(last['average_accuracy']):.2%}"
    assert expected in evaluated
    assert expected in output


def test_a_run_stopped_after_an_epoch_resumes_bit_for_bit_on_two_nodes(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """Two torchrun agents on this machine stand for the nodes; their rendezvous is that of slurm.sbatch."""
    directory, _ = finished
    shutil.copytree(directory / "checkpoints/step-0000000027", tmp_path / "checkpoints/step-0000000027")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nodes = ("--nnodes", "2", "--nproc-per-node", "1")
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-id", "digits", "--rdzv-endpoint", f"127.0.0.1:{port}")
    agent = (*TORCHRUN, *nodes, *rendezvous, *train_command(tmp_path, "--resume"))
    output = output_of(agent, agent)

    assert "continuing from step 27" in output
    assert re.findall(r"^ +(\d+) ", output, re.MULTILINE) == ["2"], "only the second epoch was left to do"
    assert not differences(tmp_path, directory)


def test_ranks_killed_while_stepping_swapping_and_saving_end_bit_identical(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """`python -m tests.stress_restarts` kills at many more moments."""
    directory, _ = finished
    kills = [
        InjectedSignal("torch/_tensor.py", "backward", call_number=22, events_after=5, rank=1, attempt=0),
        InjectedSignal("ema_dist/evaluation/swap.py", "__init__", events_after=20, rank=0, attempt=1),
        InjectedSignal("ema_dist/checkpoint/step_folders.py", "commit", events_after=5, rank=0, attempt=2),
    ]
    options = ("--checkpoint-every", "20", "--resume")
    ranks = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
    command = (*TORCHRUN, *ranks, TRAIN_WITH_SIGNALS, *train_command(tmp_path, *options)[1:])
    output = output_of(command, environment=InjectedSignal.environment(kills))

    starts = re.findall(r"^(?:starting|continuing) from (?:the|step) (\w+)", output, re.MULTILINE)
    assert starts == ["beginning", "20", "20", "20"]
    assert not differences(tmp_path, directory)


def test_a_run_starts_from_a_merge_and_switches_to_the_averages_each_epoch(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    directory, _ = finished
    merged = tmp_path / "merged"
    checkpoint.merge([directory / "checkpoints"], merged)
    options = ("--start-from", merged, "--switch-each-epoch", "--learning-rate", "1e-12")
    ranks = ("--standalone", "--nproc-per-node", "2")
    output = output_of((*TORCHRUN, *ranks, *train_command(tmp_path, *map(str, options))))
    assert f"starting from the weights in {merged}" in output
    evaluated = output_of((sys.executable, LAUNCH / "evaluate_weights.py", *merged.glob("*.safetensors")))
    # With hardly any learning rate, live weights and averages stay what the merge was.
    (scores,) = re.findall(r"loss [\d.]+, accuracy [\d.]+%", evaluated)
    last = read_metrics(tmp_path)[-1]
    for kind in ("live", "average"):
        assert scores == f"loss {float(last[f'{kind}_loss']):.4f}, accuracy {float(last[f'{kind}_accuracy']):.2%}"


def test_the_stress_test_kills_in_functions_that_exist() -> None:
    """A function that was renamed is never called: no rank would be killed there."""
    for file, function, _ in [point for points in KILL_POINTS.values() for point in points]:
        folder = Path(torch.__file__).parents[1] if file.startswith("torch/") else ROOT
        nodes = ast.walk(ast.parse((folder / file).read_text()))
        assert function in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}, (file, function)


@pytest.mark.parametrize("name", LAWS)
def test_every_schedule_is_a_law(name: str) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), decay=make_law(name, None, 648))
    ema.update()
    assert 0 <= ema.initial_mass() <= 1
    for half_life in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="--half-life"):
            make_law(name, half_life, 648)


def test_a_half_life_without_effect_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--half-life.*--schedule uniform"):
        make_law("uniform", 60.0, 648)


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_new_ones(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    command = (sys.executable, *train_command(directory))
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert again.returncode == 2
    assert re.search(r"\bstep 54\b.*--resume", again.stderr)


def test_damaged_checkpoints_are_one_line(finished: tuple[Path, str], tmp_path: Path) -> None:
    directory, _ = finished
    shutil.copytree(directory / "checkpoints/step-0000000054", tmp_path / "checkpoints/step-0000000054")
    for file in (tmp_path / "checkpoints").rglob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-5])
    command = (sys.executable, *train_command(tmp_path, "--resume"))
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert resumed.returncode == 1
    assert re.fullmatch(r"train\.py: error: .*step-0000000054/__0_0\.distcp.*\n", resumed.stderr)
