"""No file or folder on `sys.path` has the name of another package: Python would import it instead of that package."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support import LAUNCH, ROOT

TESTS = ROOT / "tests"

# `python -m launch.benchmark` puts the root on `sys.path`, `python launch/train.py` puts `launch/` there.
FOLDERS = [ROOT, LAUNCH]

# What the package works with, or its users do, and what those import: mostly not installed where the tests run.
FRAMEWORKS = {
    *("accelerate", "apex", "composer", "datasets", "deepspeed", "diffusers", "ema_pytorch", "evaluate", "fire"),
    *("huggingface_hub", "hydra", "lightning", "llmfoundry", "peft", "pytorch_lightning", "ray", "safetensors"),
    *("streaming", "timm", "torch", "torchao", "torchmetrics", "torchtitan", "torchvision", "transformers", "triton"),
    *("trl", "wandb"),
}


@cache  # reading what each distribution installs takes a second
def foreign_names() -> set[str]:
    """Names that belong to somebody else: the standard library, installed distributions and `FRAMEWORKS`."""
    distributions = packages_distributions()
    installed = {name for name, providers in distributions.items() if {*providers} != {"ema-dist"}}
    return {*sys.stdlib_module_names} | installed | FRAMEWORKS


def shadowing(folder: Path) -> list[str]:
    """What would be imported from `folder` under a foreign name: modules, packages and namespace packages."""
    modules = {path.stem for path in folder.glob("*.py")}
    folders = {path.name for path in folder.iterdir() if path.name.isidentifier() and any(path.rglob("*.py"))}
    return sorted((modules | folders) & foreign_names())


def paths_inside(folder: Path) -> list[str]:
    """The entries of `sys.path` that lie inside `folder`."""
    return [entry for entry in sys.path if Path(entry).resolve().is_relative_to(folder)]


@pytest.mark.parametrize("folder", FOLDERS, ids=["root", "launch"])
def test_nothing_on_the_path_shadows_a_package(folder: Path) -> None:
    assert shadowing(folder) == []


def test_the_folders_checked_are_those_that_pytest_adds(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("pythonpath") == FOLDERS


def test_no_folder_of_tests_is_on_the_path() -> None:
    """Without `--import-mode=importlib` pytest adds them, and `import composer` could then import `tests/composer`."""
    assert paths_inside(TESTS) == []


@pytest.mark.world_size(1)
def test_no_folder_of_tests_is_on_the_path_of_a_rank() -> None:
    assert paths_inside(TESTS) == []


def test_a_folder_of_tests_on_the_path_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TESTS / "cli")
    assert paths_inside(TESTS) == [str(TESTS / "cli")]


@pytest.mark.parametrize(
    "file",
    [
        "composer.py",  # a framework, installed or not
        "composer/__init__.py",
        "composer/helpers.py",  # in a namespace package
        "composer/callbacks/helpers.py",
        "secrets.py",  # the standard library
        "hypothesis.py",  # an installed distribution
    ],
)
def test_a_planted_module_is_found(file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    assert shadowing(tmp_path) == [file.partition("/")[0].removesuffix(".py")]


@pytest.mark.parametrize(
    "file", ["train_composer.py", "ema_dist/__init__.py", "docs/composer.md", "evaluate/data.json"]
)
def test_other_files_pass(file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    assert shadowing(tmp_path) == []
