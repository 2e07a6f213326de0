"""The arguments, options and help texts of each command.

The module with the command's name does the work. It is imported when the command runs, because help and shell
completion must not wait for torch.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from ema_dist.cli.new_folder_commands import import_averages, merge, reconstruct
from ema_dist.cli.options import (
    CheckpointArgument,
    DtypeOption,
    EntryOption,
    FormatChoice,
    JsonOption,
    LayoutChoice,
    StepOption,
    TrackOption,
    WeightsChoice,
    WeightsOption,
    check_shard_size,
)
from ema_dist.cli.terminal import print_stderr, report_errors

app: typer.Typer = typer.Typer(
    name="ema-dist",
    help="Inspect, verify, compare, export, merge and reconstruct checkpoints of ema_dist and "
    "torch.distributed.checkpoint, and import averages by other packages. No code stored in a checkpoint is run.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # else the help keeps the line breaks of docstrings after the first paragraph
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:  # noqa: FBT001  typer calls it
    if is_asked:
        typer.echo(f"ema-dist {version('ema-dist')}")
        raise typer.Exit


@app.callback()
def _main(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@report_errors(exit_code=1)
def inspect(
    checkpoint: CheckpointArgument,
    *,
    step: StepOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a checkpoint's step, layouts, tracks, decays and tensors, and how far averages are from live weights.

    The distance of an average is |average - live| / |live|, in Euclidean norms.

    The keys of --json: path, step and saved (null after plain dcp.save; else world_size, torch, layouts by entry),
    entries (by name: kind, tensors, dtypes, pieces, bytes), averages (by entry: model, steps, updates, time, tracks
    by name: decay (kind, law as text, half_life or null, decay per unit), initial_mass, averages and distances by
    tensor), tensors (by name: shape, dtype, bytes, pieces). Numbers that are not finite are strings.
    """
    from ema_dist.cli.inspect import inspect as run  # noqa: PLC0415

    run(checkpoint, step=step, as_json=as_json)


@app.command()
@report_errors(exit_code=1)
def export(  # noqa: PLR0913  one parameter for each option
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write into.", show_default=False)],
    *,
    weights: WeightsOption = WeightsChoice.EMA,
    dtype: DtypeOption = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            callback=check_shard_size,
            metavar="SIZE",
            help="The maximum size of a file, such as 500MiB; by default 5GiB.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[  # noqa: A002
        FormatChoice | None, typer.Option(help="What files to write; by default safetensors.", show_default=False)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The name of the file; if there are several, they and their index are named after it. By default "
            "model.safetensors or pytorch_model.bin.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        LayoutChoice | None,
        typer.Option(
            metavar="LIBRARY",
            help="The library that will load OUT: transformers, diffusers, timm or averaged-model (torch's "
            "AveragedModel). The file and the tensors get the names that it expects.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Copy configuration and tokenizer (json, txt, model, jinja, ...) from there, for from_pretrained.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite weights that ema_dist did not write, and edited configuration.")
    ] = False,
    step: StepOption = None,
    track: TrackOption = None,
    entry: EntryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the averaged (or live) weights of a checkpoint into files in the Hugging Face layout.

    Tensors are streamed: memory holds at most one output file and one tensor. The files appear in OUT only after all
    checksums of the checkpoint have been verified; until then an earlier export there is kept.

    transformers, diffusers and timm load OUT with --layout and --config.

    The keys of --json: checkpoint, files (sizes in bytes by path), notes.
    """
    from ema_dist.cli.export import Destination  # noqa: PLC0415
    from ema_dist.cli.export import export as run  # noqa: PLC0415

    run(
        checkpoint,
        Destination(
            out,
            max_shard_size,
            None if format is None else format.value,
            name=name,
            config=config,
            force=force,
            layout=None if layout is None else layout.value,
        ),
        weights_kind=weights.value,
        dtype=dtype,
        step=step,
        track=track,
        entry=entry,
        as_json=as_json,
    )


@app.command()
@report_errors(exit_code=1)
def verify(checkpoint: CheckpointArgument, *, step: StepOption = None, as_json: JsonOption = False) -> None:
    """Read a whole checkpoint and list its problems. The exit code is 0 if there are none, else 1.

    Checks the sizes and checksums of its files (a folder that plain dcp.save wrote has no list of these), its
    metadata, whether every value can be read and is finite, and whether the averages match the model. Infinities
    outside of weights and optimizers are notes, not problems: buffers such as masks hold them. If a file is damaged,
    the entries in the files are not checked.

    The keys of --json: path, problems, notes, tensors, bytes.
    """
    from ema_dist.cli.verify import verify as run  # noqa: PLC0415

    if not run(checkpoint, step=step, as_json=as_json):
        raise typer.Exit(1)


@app.command()
@report_errors(exit_code=2)
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, or an export (a folder or one file).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The checkpoint or export to compare with A.")],
    *,
    weights: WeightsOption = WeightsChoice.EMA,
    weights_b: Annotated[
        WeightsChoice | None, typer.Option(help="Weights to take from B; by default as from A.", show_default=False)
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="The step to read from A, if A is a folder of steps.", show_default=False)
    ] = None,
    step_b: Annotated[
        int | None, typer.Option(help="The step to read from B, if B is a folder of steps.", show_default=False)
    ] = None,
    track: TrackOption = None,
    entry: EntryOption = None,
    rtol: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Tensors count as equal if max |b - a| <= RTOL * mean |a|, whatever their dtypes (torch.allclose "
            "compares elements). Without it, they must be bit-identical and of one dtype.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how far the weights of B are from those of A, by tensor, and which tensors only one of them has.

    Distances are relative to A: the largest is max |b - a| / mean |a|, the mean is mean |b - a| / mean |a|.

    The keys of --json: equal, only_in_a, only_in_b, shapes and dtypes (those of A and B, by tensor, if they differ),
    tensors (by name: is_equal, largest, mean, norm, differs). Numbers that are not finite are strings.

    Exit codes are those of diff(1): 0 when all is equal, 1 when something differs, 2 when they cannot be compared.
    """
    from ema_dist.checkpoint.weighted_sum.source import open_source  # noqa: PLC0415
    from ema_dist.cli.diff import diff as run  # noqa: PLC0415

    weights_a = open_source(a, weights.value, step=step, track=track, entry=entry, on_ignored=print_stderr)
    kind_b = (weights_b or weights).value
    other = open_source(b, kind_b, step=step_b, track=track, entry=entry, on_ignored=print_stderr)
    if not run(weights_a, other, rtol=rtol, as_json=as_json):
        raise typer.Exit(1)


app.command(name="merge")(merge)
app.command(name="reconstruct")(reconstruct)
app.command(name="import")(import_averages)
