"""launch/train.py stopped by a signal on one rank, and resumed on the same or another number of ranks, or refused."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import train
from ema_dist import HalfLife, ShardedEMA, checkpoint
from ema_dist.evaluation.swap import active_swaps
from recipe import metrics
from recipe.checkpoints import Checkpoints
from recipe.data import Images, load_images
from recipe.folders import require_checkpoint_dir
from recipe.preemption import Preempted, PreemptionHandler
from recipe.script import ScriptError, UsageError
from tests.support.injected_signals import read_metrics
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


SHORT = ("--device", "cpu", "--epochs", "2", "--batch-size", "600", "--half-life", "2")
STEPS, TEST_BATCHES = 2, 5  # in an epoch, with the options above

# The batch, of training or evaluation, before which a rank is signalled.
FIRST_EPOCH = 2
LIVE_EVALUATION = STEPS + 3
AVERAGES_EVALUATION = STEPS + TEST_BATCHES + 3
SECOND_EPOCH = STEPS + 2 * TEST_BATCHES + 2


@dataclass
class SeenWeights:
    """Full live weights and averages by step; empty lists on all ranks but the first."""

    saved: dict[int, list[Tensor]] = field(default_factory=dict)
    resumed: dict[int, list[Tensor]] = field(default_factory=dict)


class RecordingCheckpoints(Checkpoints):
    """Checkpoints that record weights and averages on each save and after resuming."""

    seen: ClassVar[SeenWeights]

    def save(self, step: int, *, block: bool) -> None:
        if not active_swaps(self.model):
            self.seen.saved[step] = self.weights()
        super().save(step, block=block)

    def resume(self, *, is_requested: bool) -> str:
        message = super().resume(is_requested=is_requested)
        self.seen.resumed[self.state["ema"].steps] = self.weights()
        return message

    @property
    def model(self) -> nn.Module:
        return self.state["model"]

    def weights(self) -> list[Tensor]:
        live = ShardedEMA(self.model, decay=HalfLife(0)).full_state_dict()  # the live weights
        averages = self.state["ema"].full_state_dict()
        return [*live.values(), *averages.values()]


class StopAtBatch(PreemptionHandler):
    """Signals the last rank before its batch number `stop_batch`."""

    stop_batch = 0
    stop_signal = signal.SIGTERM

    def should_stop(self) -> bool:
        self.stop_batch -= 1
        if self.stop_batch == 0 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), self.stop_signal)
        return super().should_stop()


def run(directory: Path, *options: str, stop: int = 0, checkpoints: bool = True) -> SeenWeights:
    """Trains two epochs in this process group, or until the batch number `stop`.

    The patches stay: each rank is a process of this test only.
    """
    sys.argv = ["train.py", *SHORT, "--output-dir", str(directory), *options]
    if checkpoints:
        sys.argv += ["--checkpoint-dir", str(directory / "checkpoints"), "--checkpoint-every", "1"]
    RecordingCheckpoints.seen, StopAtBatch.stop_batch = SeenWeights(), stop
    train.Checkpoints, train.PreemptionHandler = RecordingCheckpoints, StopAtBatch
    metrics.write_curves = lambda _rows, _path: None  # slower than the training
    exit_code = None
    try:
        train.train(train.parse_arguments(), torch.device("cpu"), metrics.TensorBoard(None))
    except Preempted as stopped:
        exit_code = stopped.code
    assert exit_code == ((0 if checkpoints else 1) if stop else None)
    dist.barrier()
    return RecordingCheckpoints.seen


def assert_same(actual: dict[int, list[Tensor]], expected: dict[int, list[Tensor]]) -> None:
    for step, weights in actual.items():
        for weight, other in zip(weights, expected[step], strict=True):
            torch.testing.assert_close(weight, other, rtol=0, atol=0)


def continue_on(ranks: int, rank: int, folder: Path) -> bool:
    """Replaces the default group by one of the first `ranks` ranks; returns whether this rank is one of them."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank < ranks:
        store = dist.FileStore(str(folder / f"{ranks} ranks"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    return rank < ranks


@pytest.mark.world_size(2, timeout=120)
@pytest.mark.parametrize(
    ("parallel", "stops"),
    [("ddp", [FIRST_EPOCH, AVERAGES_EVALUATION]), ("fsdp2", [LIVE_EVALUATION, AVERAGES_EVALUATION])],
)
def test_a_run_stopped_anywhere_resumes_bit_for_bit(parallel: str, stops: list[int], tmp_path: Path) -> None:
    """Only one rank is signalled; in one case while the averages are in the model."""
    uninterrupted = run(tmp_path, "--parallel", parallel)
    assert len(uninterrupted.saved) == 2 * STEPS
    for stop in stops:
        directory = tmp_path / str(stop)
        options = ("--parallel", parallel, *["--async-checkpoints"] * (stop == AVERAGES_EVALUATION))
        run(directory, *options, stop=stop)
        resumed = run(directory, *options, "--resume")
        assert [*resumed.resumed] == [min(stop - 1, STEPS)]
        assert_same(resumed.resumed | resumed.saved, uninterrupted.saved)
        assert max(resumed.saved) == 2 * STEPS
        if dist.get_rank() == 0:
            assert read_metrics(directory) == read_metrics(tmp_path)


@pytest.mark.world_size(4, timeout=120)
def test_a_run_stopped_on_four_ranks_resumes_on_three_and_on_two(tmp_path: Path) -> None:
    """Right after loading, weights and averages are bit-identical to those of the stopped run."""
    rank = dist.get_rank()
    saved = run(tmp_path, "--parallel", "hsdp", stop=SECOND_EPOCH).saved
    for ranks, step, stop in ((3, STEPS + 1, 2), (2, STEPS + 2, 0)):
        if not continue_on(ranks, rank, tmp_path):
            return
        resumed = run(tmp_path, "--parallel", "fsdp2", "--resume", stop=stop)
        assert [*resumed.resumed] == [step]
        assert_same(resumed.resumed, saved)
        saved = resumed.saved
    assert [row["step"] for row in read_metrics(tmp_path)] == [str(STEPS), str(2 * STEPS)]


@pytest.mark.world_size(2, timeout=120)
def test_a_run_stopped_on_one_rank_takes_the_remaining_steps_on_two(tmp_path: Path) -> None:
    """The batch is the same on any number of ranks, so the number of steps is too."""
    rank, saved = dist.get_rank(), {}
    if continue_on(1, rank, tmp_path):
        saved = run(tmp_path, stop=SECOND_EPOCH).saved
    continue_on(2, rank, tmp_path)
    resumed = run(tmp_path, "--parallel", "ddp", "--resume")
    assert [*resumed.resumed] == [STEPS + 1]
    assert [*resumed.saved] == [2 * STEPS]
    if rank == 0:
        assert_same(resumed.resumed, saved)
        assert [row["step"] for row in read_metrics(tmp_path)] == [str(STEPS), str(2 * STEPS)]


@pytest.mark.world_size(2, timeout=120)
def test_other_settings_than_the_checkpoints_are_refused_on_resuming(tmp_path: Path) -> None:
    """With another batch size, a resumed run once took its steps on empty batches."""
    run(tmp_path, "--parallel", "ddp", stop=2)
    different = [
        ("--batch-size", "600", "400"),
        ("--seed", "0", "7"),
        ("--learning-rate", "0.002", "0.1"),
    ]
    for option, saved, passed in different:
        with pytest.raises(UsageError, match=rf"step 1 .*{option} {saved}\b.*\b{passed}\b"):
            run(tmp_path, "--parallel", "ddp", "--resume", option, passed)

    train.load_images = images_with_another_label
    with pytest.raises(UsageError, match=r"step 1 .*data set"):
        run(tmp_path, "--parallel", "ddp", "--resume")


SETTINGS = {
    "--batch-size": 600,
    "--seed": 0,
    "--learning-rate": 0.002,
    "data set (SHA-256)": "digest",
    "--switch-each-epoch": False,
}


@pytest.mark.world_size(2, timeout=120)
@pytest.mark.parametrize(
    ("saved", "names"),
    [
        ({"model": nn.Linear(2, 2)}, "--batch-size.*--seed.*--learning-rate.*data set"),
        (
            {"settings": {**SETTINGS, "--batch-size": 400, "--seed": 7}},
            r"--batch-size 400\b.*\b600\b.*--seed 7\b.*\b0\b",
        ),
        ({"settings": {name: value for name, value in SETTINGS.items() if name != "--seed"}}, "--seed"),
    ],
    ids=["without settings", "other settings", "without a seed"],
)
def test_a_checkpoint_of_another_program_is_refused_by_its_settings(
    saved: dict[str, Any], names: str, tmp_path: Path
) -> None:
    """The error lists the missing or different settings, not the first missing tensor."""
    checkpoint.save(saved, tmp_path / "checkpoints", step=1)
    with pytest.raises(UsageError, match=names):
        run(tmp_path, "--parallel", "ddp", "--resume")


@pytest.mark.world_size(1)
def test_one_checkpoint_is_not_taken_for_a_folder_of_several(tmp_path: Path) -> None:
    checkpoint.save({"settings": SETTINGS}, tmp_path, step=1)
    folder = tmp_path / "step-0000000001"
    with pytest.raises(UsageError, match=rf"{re.escape(str(folder))} .*pass {re.escape(str(tmp_path))}$"):
        run(tmp_path, "--parallel", "plain", "--resume", "--checkpoint-dir", str(folder), checkpoints=False)


@pytest.mark.world_size(2)
def test_a_rank_that_does_not_arrive_is_not_taken_for_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load", partial(checkpoint.load, timeout=0.5))
    checkpoint.save({"settings": SETTINGS}, tmp_path, step=1)
    if dist.get_rank() == 0:
        with pytest.raises(ScriptError, match="rank 1 did not arrive") as caught:
            Checkpoints(tmp_path, {}, SETTINGS).resume(is_requested=True)
        assert not isinstance(caught.value, UsageError)
    else:
        require_checkpoint_dir(tmp_path, option="--checkpoint-dir")
    dist.barrier()


def images_with_another_label(device: torch.device) -> tuple[Images, Images]:
    training, test = load_images(device)
    training.labels[5] = (training.labels[5] + 1) % 10
    return training, test


@pytest.mark.world_size(2, timeout=120)
def test_ctrl_c_on_one_rank_without_a_checkpoint_folder_says_that_nothing_is_saved(tmp_path: Path) -> None:
    StopAtBatch.stop_signal = signal.SIGINT
    with redirect_stdout(io.StringIO()) as output:
        run(tmp_path, "--parallel", "ddp", stop=2, checkpoints=False)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["run-id.txt"]
    if dist.get_rank() == 0:
        assert re.search(r"step 1, nothing saved.*--checkpoint-dir", output.getvalue())
