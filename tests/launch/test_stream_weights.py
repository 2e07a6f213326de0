"""`launch/stream_weights.py` on two ranks, its protocol, and the program that measures it."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.recipe.weight_sync import END, STOP, Engine, receive_tensors, send_tensor, serve, sha256
from tests.support import LAUNCH, ROOT
from tests.support.injected_signals import TORCHRUN


def output_of(*command: str | Path) -> str:
    """Runs a command, which must succeed, and returns its standard output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_engine_has_the_averages_of_the_trainer() -> None:
    """Every tensor is verified after each epoch, and the engine scores as the trainer does with its averages."""
    # Some seconds: torchrun, two ranks and the engine each import torch.
    short = ("--device", "cpu", "--epochs", "2", "--batch-size", "648", "--half-life", "2")
    script = (LAUNCH / "stream_weights.py", "--parallel", "fsdp2")
    output = output_of(*TORCHRUN, "--standalone", "--nproc-per-node", "2", *script, *short)
    updates = re.findall(r"^epoch +(\d+)  engine: (\d+) tensors verified, (.*)$", output, re.MULTILINE)
    assert [(epoch, count) for epoch, count, _ in updates] == [("1", "55"), ("2", "55")]
    assert f"the averages in the trainer: {updates[-1][2]}\n" in output
    assert updates[0][2] != updates[1][2]


def test_the_engine_reports_refused_wrong_and_missing_tensors() -> None:
    """Of the engine's three tensors, one arrives with other bytes than its checksum says, and one in another dtype.

    A fourth tensor has a name that the engine does not know.
    """
    ours, theirs = multiprocessing.Pipe()
    engine = threading.Thread(target=serve, args=(theirs, lambda: nn.Sequential(nn.Linear(2, 2), nn.PReLU()), None))
    engine.start()
    send_tensor(ours, "0.weight", torch.eye(2), with_checksum=True)
    send_tensor(ours, "1.weight", torch.ones(1, dtype=torch.bfloat16), with_checksum=True)
    send_tensor(ours, "2.weight", torch.ones(1), with_checksum=True)
    header = {"name": "0.bias", "dtype": "float32", "shape": [2], "sha256": sha256(torch.zeros(2))}
    for message in (json.dumps(header).encode(), bytes([0, 0, 0, 0, 0, 0, 0, 1]), json.dumps(END).encode()):
        ours.send_bytes(message)
    assert json.loads(ours.recv_bytes()) == {
        "verified": 1,
        "refused": [
            "1.weight: expected torch.float32 [1], received torch.bfloat16 [1]",
            "2.weight: expected no such weight, received torch.float32 [1]",
        ],
        "wrong": ["0.bias"],
        "missing": ["1.weight"],
        "answer": None,
    }
    ours.send_bytes(json.dumps(STOP).encode())
    engine.join(timeout=60)
    assert not engine.is_alive()


def end_process() -> nn.Module:
    sys.exit(3)


def test_an_engine_whose_process_has_ended_is_named() -> None:
    engine = Engine(end_process)
    with pytest.raises(RuntimeError, match="exit code 3"):
        engine.update_weights([("weight", torch.zeros(2**20))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_arrive_bit_identical(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sent = torch.randn(shape).to(dtype)
    ours, theirs = multiprocessing.Pipe()
    send_tensor(ours, "layer.weight", sent, with_checksum=True)
    ours.send_bytes(json.dumps(END).encode())
    ((name, received, checksum),) = receive_tensors(theirs)
    assert (name, received.dtype, checksum) == ("layer.weight", dtype, sha256(sent))
    assert torch.equal(received, sent)


def test_both_ways_are_on_the_page(tmp_path: Path) -> None:
    # Some seconds: four ranks and two engines import torch.
    options = ("--quick", "--device", "cpu", "--repeats", "2", "--output-dir", tmp_path)
    output_of(sys.executable, "-m", "launch.cost.streaming", *options)
    records = json.loads((tmp_path / "streaming.json").read_text())["streaming"]
    assert [record["case"]["parallel"] for record in records] == ["fsdp2", "ddp"]
    for record in records:
        assert len(record["seconds"]) == 2
        assert record["seconds"].keys() == record["extra_bytes"].keys()
