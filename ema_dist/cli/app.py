"""The commands, under one name."""

from __future__ import annotations

import typer

from ema_dist.cli.diff import diff
from ema_dist.cli.export import export
from ema_dist.cli.inspect import inspect
from ema_dist.cli.terminal import clean_errors
from ema_dist.cli.verify import verify

app = typer.Typer(
    name="ema-dist",
    help="Look into checkpoints of ema_dist and torch.distributed.checkpoint, check, compare and export them. "
    "Nothing that a checkpoint holds is ever run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(clean_errors(inspect))
app.command()(clean_errors(export))
app.command()(clean_errors(verify))
app.command()(clean_errors(diff, code=2))
