"""What the commands share: consoles, progress bars, and errors and warnings printed as messages."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

P = ParamSpec("P")

PIPE_COLUMNS = 160
"""The least width of a table that is written into a file or a pipe, whose width is not known."""


class _EscapingConsole(Console):
    """Prints control characters as escape sequences: names in a checkpoint could otherwise control the terminal."""

    def render_str(self, text: str, **settings: Any) -> Text:  # noqa: ANN401  as in rich
        printable = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
        return super().render_str(printable, **settings)


def stdout_console() -> Console:
    """The console for results."""
    console = _EscapingConsole(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(PIPE_COLUMNS, console.width)
    return console


def print_stderr(message: str) -> None:
    """Prints a message on stderr, apart from the results."""
    _stderr_console().print(escape(message))


def fail(message: str, exit_code: int) -> NoReturn:
    """Prints an error on stderr and ends the command with the exit code.

    Raises: typer.Exit.
    """
    _stderr_console().print(f"[bold red]error:[/] {escape(message)}")
    raise typer.Exit(exit_code)


def report_errors(*, exit_code: int) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorates a command: an error that users can cause ends it with a message and this code, without a traceback."""

    def decorate(command: Callable[P, None]) -> Callable[P, None]:
        @wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            # Here, because help and completion must not import torch, which this does. Before `_plain_warnings`, which
            # would show warnings that imports cause and Python hides.
            from ema_dist.checkpoint.errors import CheckpointError  # noqa: PLC0415

            try:
                with _plain_warnings():
                    command(*args, **kwargs)
            except BrokenPipeError:
                sys.stderr.close()  # else Python complains at exit that it cannot flush
                raise typer.Exit(exit_code) from None
            except OSError as error:
                prefix = f"{error.filename}: " if error.filename else ""
                fail(f"{prefix}{error.strerror or error}", exit_code)
            except (CheckpointError, ValueError) as error:
                fail(str(error), exit_code)
            except KeyboardInterrupt:
                fail("interrupted", 130)

        return run

    return decorate


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], object]]:
    """Shows a bar on stderr, if that is a terminal, until the block ends; the caller advances it by bytes."""
    console = Console(stderr=True)
    if not console.is_terminal:  # a bar that is disabled ends with an empty line before rich 14
        yield lambda _size: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda size: bar.advance(task, size)


def format_bytes(size: int) -> str:
    """A size with a binary unit, such as ``1.5 MiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _stderr_console() -> Console:
    return _EscapingConsole(stderr=True, highlight=False, emoji=False, soft_wrap=True)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints warnings as messages on stderr, without the line of code that raised them."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print_stderr(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield
