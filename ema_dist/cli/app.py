"""The arguments, options and help texts of each command.

The work of a command is in the module of its name. That module is imported when the command runs, because help and
shell completion must not wait for torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ema_dist.cli.options import (
    CheckpointArgument,
    DtypeOption,
    EntryOption,
    FormatChoice,
    ShardSizeOption,
    StepOption,
    TrackOption,
    WeightsChoice,
    WeightsOption,
)
from ema_dist.cli.terminal import report_errors

app = typer.Typer(
    name="ema-dist",
    help="Look into checkpoints of ema_dist and torch.distributed.checkpoint, check, compare and export them. "
    "Nothing that a checkpoint holds is ever run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
@report_errors(exit_code=1)
def inspect(
    checkpoint: CheckpointArgument,
    *,
    step: StepOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """Show what is in a checkpoint: step, layouts, tracks, decays, tensors, and how far averages are from live weights.

    The distance of an average is |average - live| / |live|, in Euclidean norms.

    The keys of --json: path, step and saved (null after plain dcp.save; else world_size, torch, layouts by entry),
    entries (by name: kind, tensors, pieces, bytes), averages (by entry: model, steps, updates, tracks by name: decay,
    averages and distances by tensor), tensors (by name: shape, dtype, bytes, pieces). Numbers that are not finite are
    strings.
    """
    from ema_dist.cli.inspect import inspect as run  # noqa: PLC0415

    run(checkpoint, step=step, as_json=as_json)


@app.command()
@report_errors(exit_code=1)
def export(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write into.", show_default=False)],
    *,
    weights: WeightsOption = WeightsChoice.EMA,
    dtype: DtypeOption = None,
    max_shard_size: ShardSizeOption = "5GB",
    format: Annotated[FormatChoice, typer.Option(help="What files to write.")] = FormatChoice.SAFETENSORS,  # noqa: A002
    step: StepOption = None,
    track: TrackOption = None,
    entry: EntryOption = None,
) -> None:
    """Write the averaged (or live) weights of a checkpoint into files in the Hugging Face layout.

    One process, by stream: at most one output file and one tensor are in memory. Nothing is written unless all is well,
    the checksums of the checkpoint's files included; an earlier export of the same format in OUT is replaced then.
    """
    from ema_dist.cli.export import export as run  # noqa: PLC0415

    run(
        checkpoint,
        out,
        weights_kind=weights.value,
        dtype=dtype,
        max_shard_size=max_shard_size,
        file_format=format.value,
        step=step,
        track=track,
        entry=entry,
    )


@app.command()
@report_errors(exit_code=1)
def verify(checkpoint: CheckpointArgument, *, step: StepOption = None) -> None:
    """Read all of a checkpoint and tell what is wrong with it: exit code 0 for nothing, 1 with a list on stdout.

    Checked are sizes and checksums of its files (a folder that plain dcp.save wrote has no list of these), its
    metadata, whether every value can be read and is finite, and whether the averages fit the model. Infinities outside
    of weights and optimizers are noted only: masks kept as buffers hold them.
    """
    from ema_dist.cli.verify import verify as run  # noqa: PLC0415

    if not run(checkpoint, step=step):
        raise typer.Exit(1)


@app.command()
@report_errors(exit_code=2)
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, or an export (a folder or one file).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    *,
    weights: WeightsOption = WeightsChoice.EMA,
    weights_b: Annotated[
        WeightsChoice | None, typer.Option(help="The same for B; as for A otherwise.", show_default=False)
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Of A, if that is a root of checkpoints.", show_default=False)
    ] = None,
    step_b: Annotated[int | None, typer.Option(help="Of B, if that is one.", show_default=False)] = None,
    track: TrackOption = None,
    entry: EntryOption = None,
) -> None:
    """Show how far the weights of B are from those of A, tensor by tensor, and what only one of them has.

    Relative to A: the largest distance is max |b - a| / mean |a|, the mean one is mean |b - a| / mean |a|.

    Exit codes are those of diff(1): 0 when all is equal, 1 when something differs, 2 when they cannot be compared.
    """
    from ema_dist.cli.diff import diff as run  # noqa: PLC0415
    from ema_dist.cli.diff import open_weights  # noqa: PLC0415

    weights_a = open_weights(a, weights.value, step=step, track=track, entry=entry)
    if not run(weights_a, open_weights(b, (weights_b or weights).value, step=step_b, track=track, entry=entry)):
        raise typer.Exit(1)
