"""The command `ema-dist`: inspects checkpoints, verifies them, compares them, and exports their weights.

`app` holds the arguments and help texts, and the module with a command's name does its work. Code that a program may
want to call, such as readers of checkpoints and writers of weights, belongs in ``ema_dist.checkpoint``.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

REQUIRED_PACKAGES = ("huggingface_hub", "rich", "safetensors", "typer", "xxhash")
"""The packages of the extra ``cli``. `main` imports none of them before it has found all of them."""


def main() -> None:
    """Runs the command line with the arguments of the process.

    Raises: SystemExit with the exit code: 0 on success, 1 for an invalid checkpoint, 2 for wrong usage.
    """
    if missing := [name for name in REQUIRED_PACKAGES if find_spec(name) is None]:
        sys.exit(
            f"ema-dist needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install {' '.join(missing)}"
        )
    from ema_dist.cli.app import app  # noqa: PLC0415  it imports rich and typer

    try:
        app(prog_name="ema-dist")  # also under `python -m`: shell completion is derived from this name
    except SystemExit as exit_:
        # typer exits with 1 if its output pipe is closed. For help (`| head`) that is not a failure. For an error
        # message it is: the BrokenPipeError was then raised while another exception was handled (`__context__`).
        cause = exit_.__context__
        if not isinstance(cause, BrokenPipeError) or cause.__context__ is not None:
            raise
