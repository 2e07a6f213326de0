"""The public API as text, one line for each name: ``python -m tests.support.public_api`` writes it anew.

Composer's integration is left out, because Composer is not installed beside the other packages.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module

from typer.main import get_command

from ema_dist.cli.app import app
from tests.support import ROOT

PUBLIC_MODULES = ("ema_dist", "ema_dist.checkpoint", "ema_dist.posthoc")

FILE = ROOT / "tests" / "public_api.txt"


def public_api() -> str:
    """Every public name with its signature, and every option of the command."""
    lines = [line for module in PUBLIC_MODULES for line in _describe_module(module)]
    return "\n".join([*lines, *_describe_commands(), ""])


def _describe_module(module: str) -> Iterator[str]:
    for name in import_module(module).__all__:
        value = getattr(import_module(module), name)
        yield f"{module}.{name}{_signature(value)}"
        if inspect.isclass(value) and value.__module__.startswith("ema_dist"):
            for member in sorted(dir(value)):
                if not member.startswith("_") and not hasattr(Exception, member):
                    yield f"{module}.{name}.{member}{_signature(getattr(value, member))}"


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
        yield f"ema-dist {name} {' '.join(options)}"


if __name__ == "__main__":
    FILE.write_text(public_api())
