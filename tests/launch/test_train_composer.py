"""`launch/train_composer.py` and the script of docs/composer.md, started by torchrun and by Composer's launcher."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import LAUNCH, ROOT
from tests.support.injected_signals import TORCHRUN

pytest.importorskip("composer", reason="needs Composer, which has an environment of its own: tox -e composer")

SCRIPT = LAUNCH / "train_composer.py"
TWO_RANKS = (*TORCHRUN, "--standalone", "--nproc-per-node", "2")
COMPOSER = (sys.executable, "-m", "composer.cli", "-n", "2")
EXAMPLE = re.compile(r'^```py title="train.py"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
EVALUATION = re.compile(r"^epoch (\d+), batch (\d+): live (.+); average (.+)$", re.MULTILINE)


def run(*command: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; `stdout` of the result has standard error too."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, **streams, text=True, env=environment, cwd=folder, timeout=540, check=False)


def output_of(*command: str | Path, folder: Path | None = None) -> str:
    """Runs a command, which must succeed, and returns all that it prints."""
    completed = run(*command, folder=folder)
    assert completed.returncode == 0, completed.stdout
    return completed.stdout


def terminal_output_of(*command: str | Path) -> str:
    """Runs a command on a terminal, which must succeed; in the output, a redrawn line is a new line."""
    terminal, child_end = pty.openpty()
    termios.tcsetwinsize(child_end, (24, 200))
    process = subprocess.Popen(command, stdout=child_end, stderr=child_end, env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(child_end)
    timer = threading.Timer(540, process.kill)
    timer.start()
    with os.fdopen(terminal, "rb", buffering=0) as file:
        chunks = []
        try:
            while chunk := file.read(4096):
                chunks.append(chunk)
        except OSError:  # Linux raises EIO when the other end is closed
            pass
    exit_code = process.wait()
    timer.cancel()
    output = b"".join(chunks).decode()
    assert exit_code == 0, output
    return output.replace("\r", "\n")


def train_command(folder: Path, *options: str) -> tuple[str | Path, ...]:
    """The script with its checkpoints in `folder`."""
    return (SCRIPT, "--device", "cpu", "--save-folder", folder, *options)


def evaluations(output: str) -> list[tuple[str, ...]]:
    """Epoch, batch, live scores and average scores of each evaluation, in the order printed."""
    return EVALUATION.findall(output)


def evaluation_of(folder: Path, weights: dict[str, torch.Tensor]) -> str:
    """What evaluate_weights.py, which imports neither Composer nor ema_dist, prints for a classifier's weights."""
    file = folder / "plain.safetensors"
    save_file({name.removeprefix("module.").removeprefix("module."): tensor for name, tensor in weights.items()}, file)
    return output_of(sys.executable, SCRIPT.with_name("evaluate_weights.py"), file)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The checkpoints and the output of two epochs by torchrun."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, output_of(*TWO_RANKS, *train_command(folder, "--epochs", "2"))


def test_each_epoch_prints_the_scores_of_live_and_averaged_weights_once(finished: tuple[Path, str]) -> None:
    folder, output = finished
    assert "starting at batch 0" in output
    assert [row[:2] for row in evaluations(output)] == [("1", "27"), ("2", "54")]
    assert "\x1b" not in output, "control codes where there is no terminal"

    state = torch.load(folder / "ep2-ba54-rank0.pt", weights_only=False)["state"]
    *_, live, average = evaluations(output)[-1]
    assert live in evaluation_of(folder, dict(state["algorithms"])["EMA"]["ema_model"]["named_parameters_dict"])
    assert average in evaluation_of(folder, state["model"])
    assert live != average


def test_composers_launcher_resumes_what_torchrun_began_to_the_same_scores(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder, output = finished
    shutil.copy(folder / "ep1-ba27-rank0.pt", tmp_path)
    (tmp_path / "latest-rank0.pt").symlink_to("ep1-ba27-rank0.pt")
    resumed = output_of(*COMPOSER, *train_command(tmp_path, "--epochs", "2", "--resume"))
    assert "starting at batch 27" in resumed
    assert evaluations(resumed) == evaluations(output)[1:]


def test_an_earlier_run_is_not_continued_unasked(finished: tuple[Path, str]) -> None:
    completed = run(sys.executable, *train_command(finished[0]))
    assert completed.returncode == 2
    assert re.search(rf"error: .*{re.escape(str(finished[0]))}.*--resume", completed.stdout)


def test_other_settings_than_the_checkpoints_are_refused_on_resuming(finished: tuple[Path, str]) -> None:
    completed = run(sys.executable, *train_command(finished[0], "--resume", "--batch-size", "96"))
    assert completed.returncode == 2
    assert re.search(r"^train_composer\.py: error: .*--batch-size 48\b.*\b96\b", completed.stdout, re.MULTILINE)
    assert "Traceback" not in completed.stdout


def test_a_checkpoint_that_cannot_be_resumed_is_one_line(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Damaged; or by an older version of the script, which Composer would continue with any settings."""
    file = tmp_path / "ep1-ba27-rank0.pt"
    (tmp_path / "latest-rank0.pt").symlink_to(file.name)
    contents = torch.load(finished[0] / file.name, weights_only=False)
    del contents["state"]["callbacks"]["SettingsCheck"]
    torch.save(contents, file)
    for message in (r"--batch-size.*--seed", r"latest-rank0\.pt.*--parallel"):
        refused = run(sys.executable, *train_command(tmp_path, "--resume"))
        assert refused.returncode != 0
        assert re.search(rf"^train_composer\.py: error: .*{message}", refused.stdout, re.MULTILINE)
        assert "Traceback" not in refused.stdout
        file.write_bytes(file.read_bytes()[:-500])


def test_an_error_outside_of_loading_is_not_taken_for_a_damaged_checkpoint(tmp_path: Path) -> None:
    from train_composer import loading_errors_as_script_errors  # noqa: PLC0415  it imports Composer

    with pytest.raises(ValueError, match=r"^wrong argument$"), loading_errors_as_script_errors(tmp_path):
        raise ValueError("wrong argument")


def test_fsdp2_resumes_on_one_process_whose_progress_bar_has_both_metrics(tmp_path: Path) -> None:
    options = ("--parallel", "fsdp2", "--epochs")
    output = output_of(*TWO_RANKS, *train_command(tmp_path, *options, "1"))
    ((*_, live, average),) = evaluations(output)
    for scores, entry in ((live, "state.ema_dist.live"), (average, "state.model")):
        choice = ("--weights", "live", "--entry", entry)
        output_of(sys.executable, "-m", "ema_dist.cli", "export", tmp_path / "ep1-ba27", tmp_path / entry, *choice)
        assert scores in evaluation_of(tmp_path, load_file(tmp_path / entry / "model.safetensors"))

    refused = run(sys.executable, *train_command(tmp_path, *options, "2", "--resume", "--seed", "3"))
    assert re.search(r"error: .*--seed 0\b.*\b3\b", refused.stdout), "a sharded checkpoint holds the settings too"
    resumed = terminal_output_of(sys.executable, *train_command(tmp_path, *options, "2", "--resume"))
    assert "starting at batch 27" in resumed
    assert [row[:2] for row in evaluations(resumed)] == [("2", "54")]
    assert re.search(r"train +Epoch +1:.*27/27.*loss/train/total=", resumed)
    for label in ("eval", "eval-live"):
        assert re.search(rf"{label} +Epoch +\d+:.*1/1.*metrics/{label}/CrossEntropy=", resumed)


def test_fsdp1_on_a_cpu_is_refused_before_anything_starts() -> None:
    completed = run(sys.executable, SCRIPT, "--device", "cpu", "--parallel", "fsdp1")
    assert completed.returncode == 2
    assert "pass --parallel fsdp2" in completed.stdout


def test_the_script_of_the_page_runs_and_resumes(tmp_path: Path) -> None:
    (example,) = EXAMPLE.findall((ROOT / "docs" / "composer.md").read_text())
    (tmp_path / "train.py").write_text(example)
    first = output_of(*TWO_RANKS, "train.py", folder=tmp_path)
    assert "accuracy of the averages" in first
    (tmp_path / "train.py").write_text(example.replace('"4ep"', '"6ep"'))
    again = output_of(*COMPOSER, "train.py", folder=tmp_path)
    assert "96 batches" in again
