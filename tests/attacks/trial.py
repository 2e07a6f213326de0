"""Makes an attack, and reads it by torch and by everything in ema_dist that reads checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch
from torch import nn

from ema_dist import ShardedEMA, checkpoint
from ema_dist.checkpoint import CheckpointError
from tests.attacks import __path__ as folder_of_attacks
from tests.support.cli_runs import run

_SUPPORT = {"__main__", "payload", "test_attacks", "trial"}

ATTACKS = sorted(name for _, name, _ in iter_modules(folder_of_attacks) if name not in _SUPPORT)
"""The module names of all attacks."""


class Net(nn.Module):
    """A model with the one tensor that the crafted checkpoints hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3))


def load(folder: Path, _output: Path) -> str | None:
    return _refusal(lambda: checkpoint.load({"model": Net(), "ema": ShardedEMA(Net())}, folder))


def load_model(folder: Path, _output: Path) -> str | None:
    return _refusal(lambda: checkpoint.load({"model": Net()}, folder))


def scatter(folder: Path, _output: Path) -> str | None:
    return _refusal(lambda: checkpoint.scatter(ShardedEMA(Net()), folder))


def inspect(folder: Path, _output: Path) -> str | None:
    return _refusal_by_command("inspect", folder)


def verify(folder: Path, _output: Path) -> str | None:
    return _refusal_by_command("verify", folder)


def diff(folder: Path, _output: Path) -> str | None:
    return _refusal_by_command("diff", folder, folder)


def export(folder: Path, output: Path) -> str | None:
    return _refusal_by_command("export", folder, output, "--weights", "live")


def import_(folder: Path, output: Path) -> str | None:
    files = [path for path in (folder / "pytorch_model.bin", folder / "averages.pt") if path.exists()]
    refusals = [_refusal_by_command("import", path, "-o", output) for path in files or [folder]]
    return next((refusal for refusal in refusals if refusal), None)


READERS: dict[str, Callable[[Path, Path], str | None]] = {
    "checkpoint.load": load,
    "checkpoint.load of the model": load_model,
    "checkpoint.scatter": scatter,
    "ema-dist inspect": inspect,
    "ema-dist verify": verify,
    "ema-dist diff": diff,
    "ema-dist export": export,
    "ema-dist import": import_,
}
"""Every reader of ema_dist: it returns the error that refuses the checkpoint, or None if it reads it."""


@dataclass(frozen=True)
class Trial:
    """What an attack did."""

    threat: str
    succeeds_elsewhere: bool
    refusals: dict[str, str | None]
    harmed: list[str]


def try_attack(name: str, work: Path) -> Trial:
    """Make the attack in ``work``, an empty folder, and read it by every reader."""
    attack = import_module(f"tests.attacks.{name}")
    folder, harm = work / "checkpoint", work / "harm"
    refusals, harmed = {}, []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        attack.make(folder, harm)
        assert not harm.exists(), "making the attack has done harm already"
        for reader, read in READERS.items():
            refusals[reader] = read(folder, work / f"output of {reader}")
            if harm.exists():
                harmed.append(reader)
                harm.unlink()
        attack.read_by_torch(folder, harm)
    return Trial(attack.__doc__.splitlines()[0], harm.exists(), refusals, harmed)


def _refusal(read: Callable[[], object]) -> str | None:
    try:
        read()
    except (CheckpointError, RuntimeError, ValueError) as error:
        return str(error)
    return None


def _refusal_by_command(*arguments: object) -> str | None:
    result = run(*arguments)
    assert "\x1b" not in result.output, "the terminal would obey what a name says"
    return result.output if result.exit_code else None
