"""Modules of timm without its package: that imports torchvision, which does not load with every build of torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType

import pytest
from torch import nn


@contextmanager
def timm_module(name: str) -> Iterator[ModuleType]:
    """A module of ``timm.utils`` or ``timm.models``; the modules imported for it are removed again at exit."""
    spec = find_spec("timm")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("timm is not installed")
    (folder,) = spec.submodule_search_locations
    stubs = {name: ModuleType(name) for name in ("timm", "timm.data", "timm.models", "torchvision", "torchvision.ops")}
    stubs["timm"].__path__ = [folder]
    vars(stubs["timm"])["__version__"] = version("timm")
    for package in ("data", "models"):
        stubs[f"timm.{package}"].__path__ = [f"{folder}/{package}"]
    stubs["torchvision.ops.misc"] = misc = ModuleType("torchvision.ops.misc")
    misc.__dict__["FrozenBatchNorm2d"] = nn.BatchNorm2d
    before = dict(sys.modules)
    sys.modules.update(stubs)
    try:
        vars(stubs["timm.data"]).update(vars(import_module("timm.data.constants")))
        yield import_module(name)
    finally:
        for added in sys.modules.keys() - before.keys():
            if added.partition(".")[0] in {"timm", "torchvision"}:
                del sys.modules[added]
        sys.modules.update({name: before[name] for name in stubs if name in before})
