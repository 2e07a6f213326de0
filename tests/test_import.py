"""`import ema_dist` brings torch and nothing else, and leaves the process as it was."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import ema_dist

OBSERVE = """
import json, logging, os, signal, sys
import torch, torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor

def state():
    return {
        "modules": sorted({name.partition(".")[0] for name in sys.modules} - {"ema_dist"}),
        "environment": dict(os.environ),
        "signal handlers": [repr(signal.getsignal(number)) for number in signal.valid_signals()],
        "logging": [[repr(logger.handlers), logger.level] for logger in (logging.root, *all_loggers())],
        "CUDA": torch.cuda.is_initialized(),
        "threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
    }

def all_loggers():
    named = logging.root.manager.loggerDict
    return [named[name] for name in sorted(named) if isinstance(named[name], logging.Logger) and named[name].handlers]

before = state()
import ema_dist
print(json.dumps([before, state()]))
"""


def test_importing_is_quiet() -> None:
    run = subprocess.run([sys.executable, "-W", "error", "-c", OBSERVE], capture_output=True, text=True, check=True)
    before, after = json.loads(run.stdout)
    assert after == before
    assert run.stderr == ""


@pytest.mark.parametrize("name", ema_dist.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    public = getattr(ema_dist, name)
    assert public.__doc__, f"{name} has no docstring"
    if inspect.isclass(public):
        members = [member for member in vars(public) if not member.startswith("_")]
        assert [member for member in members if not inspect.getdoc(getattr(public, member))] == []


def test_public_names_are_sorted_and_unique() -> None:
    assert list(ema_dist.__all__) == sorted(set(ema_dist.__all__))
