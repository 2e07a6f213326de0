"""Runs of launch/train.py in which ranks are signalled or killed at chosen moments, and the comparison of results."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

TRAIN_WITH_SIGNALS = Path(__file__).with_name("train_with_signals.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@dataclass(frozen=True)
class InjectedSignal:
    """A rank signals itself or torchrun, `events_after` events after call number `call_number` of a function."""

    file: str
    """The end of the path of the file that defines the function."""
    function: str
    call_number: int = 1
    events_after: int = 0
    """Calls and returns of any function in the same thread."""
    rank: int = 0
    attempt: int = 0
    """How many times torchrun has restarted the ranks."""
    signal: str = "SIGKILL"
    to_agent: bool = False

    @staticmethod
    def from_json(text: str) -> list[InjectedSignal]:
        return [InjectedSignal(**fields) for fields in json.loads(text)]

    @staticmethod
    def environment(plan: Sequence[InjectedSignal]) -> dict[str, str]:
        return os.environ | {"INJECTED_SIGNALS": json.dumps([asdict(injected) for injected in plan])}

    def __str__(self) -> str:
        moment = f"{self.events_after} events after call {self.call_number} of {self.function}()"
        return f"{self.signal} on rank {self.rank}, {moment}"


def read_metrics(directory: Path) -> list[dict[str, str]]:
    """The rows of `metrics.csv` without the column that depends on timing."""
    timing = "update_share_of_step_time"
    with (directory / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != timing} for row in csv.DictReader(file)]


def differences(directory: Path, uninterrupted: Path) -> list[str]:
    """Names of averaged weights that are not bit-identical, and epochs whose scores differ."""
    actual, expected = (load_file(folder / "model.safetensors") for folder in (directory, uninterrupted))
    weights = [name for name in actual.keys() | expected.keys() if not _is_equal(actual, expected, name)]
    rows = zip(read_metrics(directory), read_metrics(uninterrupted), strict=True)
    return sorted(weights) + [f"epoch {row['epoch']}" for row, other in rows if row != other]


def _is_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> bool:
    return name in actual and name in expected and torch.equal(actual[name], expected[name])
