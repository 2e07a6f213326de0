"""How a script begins and ends: its options, mistakes of the user as one line, and the exit code."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler


class ScriptError(ValueError):
    """Ends the script: `run_script` prints its message as one line, without a traceback."""

    exit_code = 1


class UsageError(ScriptError):
    """Ends the script with exit code 2 before training, because of an option or a folder that the user can change."""

    exit_code = 2


class OptionParser(argparse.ArgumentParser):
    """Shows defaults in `--help`, and raises a UsageError where argparse prints its usage on every rank."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(self, name: str, meaning: str, **settings: Any) -> None:  # noqa: ANN401  as `add_argument` takes
        """Add an option; its help is `meaning`, and the default if there is one that `meaning` does not describe."""
        if "default" in settings and "default" not in meaning:
            meaning += " (default: %(default)s)"
        self.add_argument(name, help=meaning, **settings)

    def print_help(self, file: Any = None) -> None:  # noqa: ANN401  as in argparse
        if _is_first_local_rank():
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the options")


def positive_int(text: str) -> int:
    """The type of options that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def print_rank_0(*lines: str) -> None:
    """Print on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", flush=True)


def run_script(main: Callable[[], None]) -> NoReturn:
    """Runs `main` and ends the process; torchrun's report of a failed run shows the exception of `main`."""
    exit_code = 0
    try:
        record(main, _ScriptErrorHandler())()
    except SystemExit as exit_request:
        if isinstance(exit_request.code, str):
            _print_line(exit_request.code)
        exit_code = exit_request.code if isinstance(exit_request.code, int) else bool(exit_request.code)
    except KeyboardInterrupt:
        exit_code = 130
        _print_line("interrupted")  # where no `PreemptionHandler` has replaced Python's own handler
    except ScriptError as error:
        exit_code = error.exit_code
        _print_line(f"error: {error}")
        if not _is_first_local_rank():
            time.sleep(30)  # torchrun kills all ranks once one exits: wait until the first rank has printed
    # Skip the interpreter's own shutdown: gloo's threads sometimes abort it (torch 2.13: "terminate called without an
    # active exception"), and torchrun would then report a failed run.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _print_line(text: str) -> None:
    if _is_first_local_rank():
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {text}\n")


class _ScriptErrorHandler(ErrorHandler):
    """Reports to torchrun the message of a ScriptError, or the message and traceback of any other exception."""

    def record_exception(self, e: BaseException) -> None:
        if not isinstance(e, ScriptError):
            super().record_exception(e)
        elif file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            message = {"message": f"error: {e}", "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": message}))


def _is_first_local_rank() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"
