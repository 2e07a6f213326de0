"""docs/command-line.md quotes the help of each command: ``RECORD=1 pytest -n 0 tests/cli/test_help_page.py``."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from ema_dist.cli.app import app
from tests.support import ROOT
from tests.support.quotations import quotations, quoted

PAGE = ROOT / "docs" / "command-line.md"
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_quotes_the_help(command: str) -> None:
    environment = {"COLUMNS": "92", "TERM": "dumb", "NO_COLOR": "1"}
    result = CliRunner(env=environment).invoke(app, [command, "--help"], prog_name="ema-dist")
    lines = [line.rstrip() for line in result.stdout.strip("\n").splitlines()]
    text = "\n".join(lines).strip("\n")
    assert quoted(PAGE, "help", command, text) == text


def test_the_page_has_every_command() -> None:
    assert sorted(quotations(PAGE, "help")) == COMMANDS
