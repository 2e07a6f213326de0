"""`import ema_dist` imports nothing else; using its names brings torch, and leaves the process as it was."""

from __future__ import annotations

import ast
import inspect
import json
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import ema_dist


def run_python(code: str) -> str:
    """The standard output of a fresh interpreter, which must print nothing on stderr."""
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


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
    others = sorted(named.keys() - {"ema_dist"})  # which has a handler that discards messages
    return [named[name] for name in others if isinstance(named[name], logging.Logger) and named[name].handlers]

before = state()
import ema_dist
after_import = state()
assert "ema_dist.ema" not in sys.modules
for name in ema_dist.__all__:
    getattr(ema_dist, name)
assert "ema_dist.ema" in sys.modules
print(json.dumps([before, after_import, state()]))
"""


def test_importing_and_using_every_name_is_quiet() -> None:
    before, after_import, after_use = json.loads(run_python(OBSERVE))
    assert after_import == before
    assert after_use == before


def test_importing_alone_imports_no_other_package() -> None:
    code = """
import importlib, logging, sys, typing
before = {*sys.modules}
import ema_dist
print(ema_dist.__version__, *({*sys.modules} - before))
"""
    assert run_python(code).split() == [ema_dist.__version__, "ema_dist"]


def test_dir_lists_the_public_names_before_they_are_used() -> None:
    code = "import ema_dist, json, sys; print(json.dumps([dir(ema_dist), 'torch' in sys.modules]))"
    listed, is_torch_imported = json.loads(run_python(code))
    assert {*ema_dist.__all__, "__version__"} <= {*listed}
    assert listed == sorted(set(listed))
    assert not is_torch_imported


def test_a_star_import_brings_the_public_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ema_dist.__all__:
        monkeypatch.delitem(vars(ema_dist), name, raising=False)  # as before the first use
    namespace: dict[str, object] = {}
    exec("from ema_dist import *", namespace)
    assert sorted(namespace.keys() - {"__builtins__"}) == ema_dist.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ema_dist' has no attribute 'Nonsense'"):
        ema_dist.Nonsense  # noqa: B018  the look-up itself is the test
    with pytest.raises(ImportError, match="cannot import name 'Nonsense' from 'ema_dist'"):
        from ema_dist import Nonsense  # noqa: F401, PLC0415


def test_type_checkers_see_the_names_where_they_are_defined() -> None:
    tree = ast.parse(Path(ema_dist.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names if node.module.startswith("ema_dist.")}
    assert sorted(seen) == ema_dist.__all__
    for name, module in seen.items():
        assert getattr(ema_dist, name) is getattr(import_module(module), name)
        assert getattr(ema_dist, name).__module__ == module


def test_public_objects_are_unpickled_in_a_process_that_has_not_used_them() -> None:
    objects = [ema_dist.HalfLife(100), *(getattr(ema_dist, name) for name in ema_dist.__all__)]
    code = f"import pickle; print(pickle.loads({pickle.dumps(objects)!r}))"
    assert str(ema_dist.HalfLife(100)) in run_python(code)


@pytest.mark.parametrize("name", ema_dist.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    public = getattr(ema_dist, name)
    assert public.__doc__, f"{name} has no docstring"
    if inspect.isclass(public):
        members = [member for member in vars(public) if not member.startswith("_")]
        assert [member for member in members if not inspect.getdoc(getattr(public, member))] == []


def test_public_names_are_sorted_and_unique() -> None:
    assert list(ema_dist.__all__) == sorted(set(ema_dist.__all__))
