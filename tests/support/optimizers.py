"""Optimizers of other packages; without the package, the test is skipped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.optim import Optimizer


def timm(file: str, name: str) -> Callable[..., Optimizer]:
    """Returns a constructor of an optimizer of timm, for the test's process or a rank."""

    def make(*arguments: Any, **settings: Any) -> Optimizer:  # noqa: ANN401
        return _timm_class(file, name)(*arguments, **settings)

    return make


def schedule_free(name: str, **settings: Any) -> Callable[[Any], Any]:  # noqa: ANN401
    """Returns a constructor of an optimizer of schedulefree, which is then in training mode."""

    def make(arguments: Any) -> Any:  # noqa: ANN401
        optimizer = getattr(pytest.importorskip("schedulefree"), name)(arguments, **settings)
        optimizer.train()
        return optimizer

    return make


@cache
def _timm_class(file: str, name: str) -> type[Optimizer]:
    """A class of timm without `import timm`, which imports torchvision: not every build of torch can load it."""
    package = find_spec("timm")
    if package is None or package.origin is None:
        pytest.skip("timm is not installed")
    others = _remove_timm()
    try:
        for parent, folder in (("timm", ""), ("timm.optim", "optim")):
            sys.modules[parent] = ModuleType(parent)
            sys.modules[parent].__path__ = [str(Path(package.origin).parent / folder)]
        return getattr(import_module(f"timm.optim.{file}"), name)
    finally:
        _remove_timm()
        sys.modules.update(others)


def _remove_timm() -> dict[str, ModuleType]:
    """Removes the modules of timm from those imported, and returns them."""
    names = [name for name in sys.modules if name.partition(".")[0] == "timm"]
    return {name: sys.modules.pop(name) for name in names}
