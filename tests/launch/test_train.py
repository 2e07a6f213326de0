"""The scripts of `launch/`, run as their users run them."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import LAUNCH
from tests.support.injected_signals import TORCHRUN, TRAIN_WITH_SIGNALS, InjectedSignal, differences, read_metrics


def run(*commands: tuple[str | Path, ...], environment: dict[str, str] | None = None) -> str:
    """What these commands print, run at the same time."""
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for command in commands
    ]
    try:
        ended = [(process, *process.communicate(timeout=300)) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output, errors in ended:
        assert process.returncode == 0, output + errors
    return "".join(output for _, output, _ in ended)


def training(directory: Path, *options: str) -> tuple[str | Path, ...]:
    """The script with its options for two epochs that leave everything in `directory`."""
    folders = ("--output-dir", directory, "--checkpoint-dir", directory / "checkpoints")
    return (LAUNCH / "train.py", "--device", "cpu", "--epochs", "2", *folders, *options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run on two ranks."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, run((*TORCHRUN, "--standalone", "--nproc-per-node", "2", *training(directory)))


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
    evaluated = run((sys.executable, LAUNCH / "evaluate_weights.py", directory / "model.safetensors"))
    last = read_metrics(directory)[-1]
    expected = f"loss {float(last['average_loss']):.4f}, accuracy {float(last['average_accuracy']):.2%}"
    assert expected in evaluated
    assert expected in output


def test_a_run_stopped_after_an_epoch_resumes_bit_for_bit_on_two_nodes(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """The nodes are two agents on this machine, which meet as slurm.sbatch lets them meet."""
    directory, _ = finished
    shutil.copytree(directory / "checkpoints/step-0000000027", tmp_path / "checkpoints/step-0000000027")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nodes = ("--nnodes", "2", "--nproc-per-node", "1")
    meeting = ("--rdzv-backend", "c10d", "--rdzv-id", "digits", "--rdzv-endpoint", f"127.0.0.1:{port}")
    agent = (*TORCHRUN, *nodes, *meeting, *training(tmp_path, "--resume"))
    output = run(agent, agent)

    assert "continuing from step 27" in output
    assert re.findall(r"^ +(\d+) ", output, re.MULTILINE) == ["2"], "only the second epoch was left to do"
    assert not differences(tmp_path, directory)


def test_ranks_killed_while_stepping_swapping_and_saving_end_bit_identical(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """stress_restarts.py kills more of them."""
    directory, _ = finished
    kills = [
        InjectedSignal("torch/_tensor.py", "backward", call_number=22, events_after=5, rank=1, attempt=0),
        InjectedSignal("ema_dist/evaluation/swap.py", "__init__", events_after=20, rank=0, attempt=1),
        InjectedSignal("ema_dist/checkpoint/step_folders.py", "commit", events_after=5, rank=0, attempt=2),
    ]
    options = ("--checkpoint-every", "20", "--resume")
    ranks = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
    command = (*TORCHRUN, *ranks, TRAIN_WITH_SIGNALS, *training(tmp_path, *options)[1:])
    output = run(command, environment=InjectedSignal.environment(kills))

    starts = re.findall(r"^(?:starting|continuing) from (?:the|step) (\w+)", output, re.MULTILINE)
    assert starts == ["beginning", "20", "20", "20"]
    assert not differences(tmp_path, directory)


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_new_ones(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    command = (sys.executable, *training(directory))
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert again.returncode == 1
    assert "step 54 in" in again.stderr
    assert "pass --resume" in again.stderr
