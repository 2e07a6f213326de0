"""The command `ema-dist`: looks into checkpoints, checks them, compares them, and turns them into files for others."""

from __future__ import annotations

import sys
from importlib.util import find_spec

REQUIRED_PACKAGES = ("huggingface_hub", "rich", "safetensors", "typer", "xxhash")
"""The packages of the extra ``cli``: none is imported before all are known to be there."""


def main() -> None:
    """Run the command line, as the shell does.

    Raises: SystemExit with the exit code: 0 for well, 1 for a checkpoint that is not, 2 for a mistake in usage.
    """
    if missing := [name for name in REQUIRED_PACKAGES if find_spec(name) is None]:
        sys.exit(
            f"ema-dist needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            'pip install "ema-dist[cli]"'
        )
    from ema_dist.cli.app import app  # noqa: PLC0415  it imports them

    app()
