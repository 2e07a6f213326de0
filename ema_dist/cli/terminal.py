"""What the commands share: how they talk, show that they are at work, and fail."""

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
"""Columns of a table that goes into a file or a pipe, where nothing tells how wide it may be."""


class _EscapingConsole(Console):
    """Shows what is no printable character by its code: names in a checkpoint could otherwise steer the terminal."""

    def render_str(self, text: str, **settings: Any) -> Text:  # noqa: ANN401  as in rich
        printable = "".join(it if it.isprintable() or it == "\n" else ascii(it)[1:-1] for it in text)
        return super().render_str(printable, **settings)


def stdout_console() -> Console:
    """Where results go."""
    console = _EscapingConsole(highlight=False, emoji=False)
    return (
        console
        if console.is_terminal
        else _EscapingConsole(highlight=False, emoji=False, width=max(PIPE_COLUMNS, console.width))
    )


def print_stderr(message: str) -> None:
    """Tell the user something beside the results, on stderr."""
    _stderr_console().print(escape(message))


def fail(message: str, code: int = 1) -> NoReturn:
    """End the command with an error on stderr."""
    _stderr_console().print(f"[bold red]error:[/] {escape(message)}")
    raise typer.Exit(code)


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
    """A bar on stderr, if that is a terminal, gone when all is done; the caller advances it by bytes."""
    console = Console(stderr=True)
    if not console.is_terminal:  # a bar that is disabled ends with an empty line before rich 14
        yield lambda _count: None
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
        yield lambda count: bar.advance(task, count)


def format_bytes(size: int) -> str:
    """A size as people read it."""
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
    """Warnings as a sentence on stderr, without the line of code that gave them."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print_stderr(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield
