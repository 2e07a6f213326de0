"""What the commands share: consoles, progress bars, and errors and warnings printed as messages."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import IO, Any, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

P = ParamSpec("P")

PIPE_COLUMNS = 160
"""The minimum width of a table that is written to a file or a pipe."""


class _EscapingConsole(Console):
    """Prints control characters as escape sequences: names in a checkpoint could otherwise control the terminal."""

    def render_str(self, text: str, **settings: Any) -> Text:  # noqa: ANN401  as in rich
        printable = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
        return super().render_str(printable, **settings)

    def print(self, *objects: Any, **settings: Any) -> None:  # noqa: ANN401  as in rich
        try:
            super().print(*objects, **settings)
        except BrokenPipeError:  # rich before 13.8 does not call `on_broken_pipe`
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        _discard_output(self.file)  # rich's own method ends the process with exit code 1


def stdout_console() -> Console:
    """The console for results."""
    console = _EscapingConsole(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(PIPE_COLUMNS, console.width)
    return console


def print_table(table: Table) -> None:
    """Prints a table of results. Rows may be wider than the terminal, so that names are not wrapped."""
    console = stdout_console()
    width = Measurement.get(console, console.options.update(max_width=sys.maxsize), table).maximum
    console.width = max(console.width, width)
    console.print(table, crop=False)


def print_json(summary: Any) -> None:  # noqa: ANN401  JSON
    """Prints one JSON object; numbers that JSON cannot represent become strings."""
    try:
        typer.echo(json.dumps(_replace_non_finite(summary), indent=1, allow_nan=False))
    except BrokenPipeError:
        _discard_output(sys.stdout)


def print_stderr(message: str) -> None:
    """Prints a message on stderr, because stdout is for results."""
    _stderr_console().print(escape(message))


def fail(message: str, exit_code: int) -> NoReturn:
    """Prints an error on stderr and ends the command with the exit code.

    Raises: typer.Exit.
    """
    _stderr_console().print(f"[bold red]error:[/] {escape(message)}")
    raise typer.Exit(exit_code)


def report_errors(*, exit_code: int) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorates a command: errors that users can cause print a message without a traceback, and exit with this code."""

    def decorate(command: Callable[P, None]) -> Callable[P, None]:
        @wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            # Imported here, because it imports torch, for which help and completion must not wait. Imported before
            # `_plain_warnings`, which would show import warnings that Python hides.
            try:
                from ema_dist.checkpoint.errors import CheckpointError  # noqa: PLC0415

                try:
                    with _plain_warnings():
                        command(*args, **kwargs)
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
def exit_on_sigterm() -> Iterator[None]:
    """Raises SystemExit(143) on SIGTERM until the block ends, so that `with` blocks remove unfinished files."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], object]]:
    """Shows a bar on stderr, if that is a terminal, until the block ends; the caller advances it by bytes."""
    console = Console(stderr=True)
    if not console.is_terminal:  # before rich 14, a disabled bar prints an empty line
        yield lambda _size: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        SpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda size: bar.advance(task, size)


class SpeedColumn(ProgressColumn):
    """Bytes per second in binary units; rich's own column uses decimal units."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{format_bytes(int(speed))}/s", style="progress.data.speed")


def format_bytes(size: int) -> str:
    """A size with a binary unit, such as ``1.5 MiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def print_files(sizes: Mapping[str, int]) -> None:
    """Prints a line for each file that a command has written: its path and size."""
    for path, size in sizes.items():
        stdout_console().print(f"{path}  {format_bytes(size)}", markup=False, soft_wrap=True)


def _stderr_console() -> Console:
    return _EscapingConsole(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def _discard_output(file: IO[str]) -> None:
    """Discards further output, because the reader, such as head, has closed the pipe.

    The command continues and keeps its exit code.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def _replace_non_finite(summary: Any) -> Any:  # noqa: ANN401  JSON
    match summary:
        case dict():
            return {key: _replace_non_finite(value) for key, value in summary.items()}
        case list():
            return [_replace_non_finite(value) for value in summary]
        case float() if not math.isfinite(summary):
            return str(summary)
    return summary


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints warnings as messages on stderr, without the line of code that raised them."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print_stderr(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield
