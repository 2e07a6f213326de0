"""The layers of the library, read off its syntax trees: who imports whom, and who may know a wrapper."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import ema_dist

PACKAGE = Path(ema_dist.__file__).parent

# A module imports only from rows below its own; one with the name of a folder stands for all modules in it.
ROWS = {
    "__init__": 19,
    "cli": 18,
    "diffusers": 18,
    "transformers": 18,
    "accelerate": 17,
    "composer": 17,
    "lightning": 17,
    "checkpoint": 16,
    "checkpoint.combine": 15,
    "checkpoint.importing": 15,
    "checkpoint.weighted_sum": 14,
    "checkpoint.gathering": 13,
    "checkpoint.loading": 13,
    "checkpoint.stored_checkpoint": 13,
    "checkpoint.saving": 12,
    "checkpoint.optimizer_entry": 11,
    "checkpoint.optimizer_wrappers": 10,
    "checkpoint.planner": 10,
    "checkpoint.writer": 11,
    "checkpoint.find_checkpoint": 11,
    "checkpoint.entries": 10,
    "checkpoint.manifest": 10,
    "checkpoint.weights": 10,
    "checkpoint.dcp": 9,
    "checkpoint.agreement": 8,
    "checkpoint.folders": 8,
    "checkpoint.step_folders": 8,
    "checkpoint.values": 8,
    "checkpoint.errors": 7,
    "ema": 6,
    "ema_states": 5,
    "functional": 5,
    "evaluation": 4,
    "averages": 3,
    "communication": 2,
    "posthoc": 2,
    "schedules": 1,
    "kernels": 1,
    "sharding": 1,
    "messages": 0,
    "modes": 0,
    "signals": 0,
}

WRAPPERS = {"DTensor", "FullyShardedDataParallel", "DistributedDataParallel", "_orig_mod", "_fsdp_wrapped_module"}
IN_WORDS_TOO = WRAPPERS - {"DTensor"}  # a message may say DTensor, the others would be matched against names

# torch's multi-tensor operations have no other spelling.
PUBLIC_IN_PRACTICE = "_foreach_"


def faults(source: str, path: Path) -> list[str]:
    """What the source of `path` (relative to the package) does that its layer must not, one line each."""
    tree = ast.parse(source)
    component = _component(path.with_suffix("").parts)
    found = list(_import_faults(tree, component, path))
    if component != "sharding":
        found += [f"spells {name}: only ema_dist.sharding knows the wrappers" for name in _wrappers_spelled(tree)]
        found += [f"uses the private {name}: only ema_dist.sharding may" for name in _private_names(tree)]
    return [f"{path}: {fault}" for fault in found]


def _import_faults(tree: ast.Module, component: str | None, path: Path) -> Iterator[str]:
    if component is None:
        yield f"{path.with_suffix('')} has no row: add it to ROWS in tests/test_layers.py"
        return
    for target in sorted(_components_imported(tree, path), key=str):
        if target == component:
            continue
        if target is None:
            yield "imports from the package itself or from no known module: name the module that defines it"
        elif ROWS[target] >= ROWS[component]:
            yield f"row {ROWS[component]} imports {target}, which is in row {ROWS[target]}"


def _component(parts: Sequence[str]) -> str | None:
    """The key in ROWS of a module given by the parts of its name below `ema_dist`: the longest that fits."""
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in ROWS), None)


def _components_imported(tree: ast.Module, path: Path) -> set[str | None]:
    """The component of each module of `ema_dist` that is imported, relative imports included."""
    imported = [name.split(".") for name in _modules_imported(tree, path)]
    return {_component(parts[1:] or ["__init__"]) for parts in imported if parts[0] == "ema_dist"}


def _modules_imported(tree: ast.Module, path: Path) -> Iterator[str]:
    package = ("ema_dist", *path.parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _wrappers_spelled(tree: ast.Module) -> list[str]:
    words = {word for text in _strings(tree) for word in re.findall(r"\w+", text)}
    return sorted(WRAPPERS & set(_identifiers(tree)) | IN_WORDS_TOO & words)


def _identifiers(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                yield name
            case ast.alias(name=name):
                yield from name.split(".")


def _strings(tree: ast.Module) -> Iterator[str]:
    """Every string but the docstrings."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


def _private_names(tree: ast.Module) -> list[str]:
    """Private attributes of anything but `self` and `cls`, and private parts of torch's module paths."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(attr=name):
                names.add(name)
            case ast.Import(names=aliases):
                names.update(part for alias in aliases for part in alias.name.split("."))
            case ast.ImportFrom(module=str(module), names=aliases) if module.split(".")[0] == "torch":
                names.update([*module.split("."), *(alias.name for alias in aliases)])
    return sorted(name for name in names if _is_private(name))


def _is_private(name: str) -> bool:
    dunder = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and not dunder and not name.startswith(PUBLIC_IN_PRACTICE)


def _modules_imported_by(path: Path) -> set[Path]:
    """The modules of the package that a module imports, itself left out, by their paths relative to the package."""
    imported = set()
    for name in _modules_imported(ast.parse((PACKAGE / path).read_text()), path):
        parts = name.split(".")[1:] if name.startswith("ema_dist.") else []
        for target in (Path(*parts[:length]).with_suffix(".py") for length in range(len(parts), 0, -1)):
            if (PACKAGE / target).exists():
                imported.add(target)
                break
    return imported - {path}


SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_modules_keep_to_their_layer(path: Path) -> None:
    assert faults((PACKAGE / path).read_text(), path) == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Also inside a folder, whose modules all have the same level."""
    graphlib.TopologicalSorter({path: _modules_imported_by(path) for path in SOURCES}).prepare()


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("schedules/clock.py", "from ema_dist.ema import ShardedEMA", "row 1 imports ema, which is in row 6"),
        ("schedules/clock.py", "from ema_dist import averages", "row 1 imports averages, which is in row 3"),
        ("messages.py", "def later():\n    from . import averages", "row 0 imports averages, which is in row 3"),
        ("sharding/mesh_shard.py", "from ..kernels import lerp_", "row 1 imports kernels, which is in row 1"),
        ("sharding/mesh_shard.py", "import ema_dist.ema", "row 1 imports ema, which is in row 6"),
        (
            "checkpoint/dcp/reader.py",
            "from ..saving import save",
            "row 9 imports checkpoint.saving, which is in row 12",
        ),
        (
            "checkpoint/saving.py",
            "from ema_dist.checkpoint import load",
            "row 12 imports checkpoint, which is in row 16",
        ),
        ("ema.py", "import ema_dist", "row 6 imports __init__, which is in row 19"),
        ("ema.py", "from ema_dist import ShardedEMA", "name the module that defines it"),
        ("helpers.py", "", "helpers has no row: add it"),
        ("ema.py", "from torch.distributed.tensor import DTensor", "spells DTensor"),
        ("ema.py", "isinstance(model, nn.parallel.DistributedDataParallel)", "spells DistributedDataParallel"),
        ("ema.py", "name.replace('_orig_mod.', '')", "spells _orig_mod"),
        ("ema.py", "model._fsdp_wrapped_module", "spells _fsdp_wrapped_module"),
        ("ema.py", "self.tensor._version", "uses the private _version"),
        ("ema.py", "from torch.optim.optimizer import _use_grad", "uses the private _use_grad"),
        ("ema.py", "import torch._dynamo", "uses the private _dynamo"),
        ("ema.py", "from torch.utils._pytree import tree_map", "uses the private _pytree"),
    ],
)
def test_a_breach_is_found(path: str, source: str, fault: str) -> None:
    assert any(fault in found for found in faults(source, Path(path)))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ema.py", '"""Stores a DTensor, strips _orig_mod."""\nfrom ema_dist.sharding import Shard\nself._shards = []'),
        ("ema.py", "raise ValueError('expected a DTensor')\nself.__class__.__name__"),
        ("kernels/lerp.py", "torch._foreach_lerp_(averages, values, weight)"),
        ("sharding/mesh_shard.py", "from ema_dist.sharding.shard import Shard\nfrom .names import places"),
        ("sharding/mesh_shard.py", "from torch.distributed.tensor import DTensor\ntensor._local_tensor"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert faults(source, Path(path)) == []
