"""The public API as text, one line for each name: ``python -m tests.support.public_api`` writes it anew.

Lines about frameworks that are not installed stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

from typer.main import get_command

from ema_dist.cli.app import app
from tests.support import ROOT

FRAMEWORKS = {
    "ema_dist.accelerate": ("accelerate",),
    "ema_dist.composer": ("composer",),
    "ema_dist.diffusers": ("diffusers",),
    "ema_dist.lightning": ("lightning",),
    "ema_dist.transformers": ("transformers", "accelerate"),
}
"""The packages that a public module needs, beside those of the extra ``cli``."""

MODULES = ("ema_dist", "ema_dist.checkpoint", "ema_dist.posthoc", *FRAMEWORKS)
COMMAND = "ema-dist"
SECTIONS = (*MODULES, COMMAND)

FILE = ROOT / "tests" / "public_api.txt"


def is_available(section: str) -> bool:
    """Whether the packages are installed that this module needs."""
    return None not in map(find_spec, FRAMEWORKS.get(section, ()))


def describe(section: str) -> list[str]:
    """Every public name of a module with its signature, or every option of the command."""
    return [*(_describe_commands() if section == COMMAND else _describe_module(section))]


def recorded(section: str) -> list[str]:
    """The lines of the file about a module or the command."""
    return [line for line in FILE.read_text().splitlines() if _section(line) == section]


def _section(line: str) -> str:
    return max((module for module in MODULES if line.startswith(f"{module}.")), key=len, default=COMMAND)


def _describe_module(module: str) -> Iterator[str]:
    for name in import_module(module).__all__:
        value = getattr(import_module(module), name)
        yield f"{module}.{name}{_signature(value)}"
        if inspect.isclass(value) and value.__module__.startswith("ema_dist"):
            for member in sorted(_own_members(value)):
                if not member.startswith("_") and not hasattr(Exception, member):
                    yield f"{module}.{name}.{member}{_signature(getattr(value, member))}"


def _own_members(cls: type) -> set[str]:
    """Without those of a framework's classes, which differ between its versions."""
    return {member for base in cls.__mro__ if base.__module__.startswith("ema_dist") for member in vars(base)}


def _signature(value: object) -> str:
    if not callable(value):
        return ""
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # the class has no constructor of its own
        return "(...)"
    return str(inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in parameters]))


def _describe_commands() -> Iterator[str]:
    for name, command in sorted(get_command(app).commands.items()):
        options = sorted(
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        )
        yield f"{COMMAND} {name} {' '.join(options)}"


if __name__ == "__main__":
    sections = [(describe if is_available(section) else recorded)(section) for section in SECTIONS]
    FILE.write_text("".join(f"{line}\n" for section in sections for line in section))
