"""The arguments, options and help texts of each command.

The module with the command's name does the work. It is imported when the command runs, because help and shell
completion must not wait for torch.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from ema_dist.cli.options import (
    CheckpointArgument,
    DecayChoice,
    DtypeOption,
    EntryOption,
    FormatChoice,
    ImportChoice,
    ImportFormatChoice,
    JsonOption,
    LayoutChoice,
    NewFolderOption,
    OutputFormatChoice,
    OutputFormatOption,
    ShardSizeOption,
    StepOption,
    TrackOption,
    WeightsChoice,
    WeightsOption,
    check_shard_size,
    parse_coefficients,
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


@app.command()
@report_errors(exit_code=1)
def merge(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CKPT...",
            help="Checkpoints of ema_dist or DCP, and files or folders of weights (safetensors, bin, pt, pth), oldest "
            "first. A folder of checkpoints means all of its steps.",
            show_default=False,
        ),
    ],
    *,
    out: NewFolderOption,
    coefficients: Annotated[
        str | None,
        typer.Option(
            metavar="C,C,...",
            help="One for each checkpoint; their sum must be 1. By default, the mean.",
            show_default=False,
        ),
    ] = None,
    emulate_decay: Annotated[
        DecayChoice | None,
        typer.Option(help="Use the coefficients that emulate this decay of the learning rate.", show_default=False),
    ] = None,
    weights: Annotated[WeightsChoice, typer.Option(help="The live weights, or the averages.")] = WeightsChoice.LIVE,
    track: TrackOption = None,
    last: Annotated[
        int | None, typer.Option(min=1, help="Merge only the last N checkpoints.", metavar="N", show_default=False)
    ] = None,
    dtype: DtypeOption = None,
    max_shard_size: ShardSizeOption = "5GiB",
    format: OutputFormatOption = OutputFormatChoice.SAFETENSORS,  # noqa: A002
    entry: EntryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the weighted mean of the weights in several checkpoints, saved from any layouts and numbers of ranks.

    Prints the coefficients first. Integer tensors and extra states of modules come from the last checkpoint. Each input
    byte is read once, so the checksums of the checkpoints are not verified: run ema-dist verify for that. The output is
    read back and verified before OUT appears. OUT/merge.json has the path, step, coefficient and checksum of each
    source.

    Several processes share the work: torchrun --nproc-per-node 4 -m ema_dist.cli merge ...

    The keys of --json: sources (as in merge.json), notes, files (sizes in bytes by path).
    """
    from ema_dist.cli.merge import merge as run  # noqa: PLC0415

    if coefficients is not None and emulate_decay is not None:
        raise typer.BadParameter("--coefficients and --emulate-decay are mutually exclusive")
    run(
        checkpoints,
        out,
        coefficients=None if coefficients is None else parse_coefficients(coefficients),
        emulate_decay=None if emulate_decay is None else emulate_decay.value,
        weights_kind=weights.value,
        track=track,
        entry=entry,
        last=last,
        dtype=dtype,
        max_shard_size=max_shard_size,
        file_format=format.value,
        as_json=as_json,
    )


@app.command()
@report_errors(exit_code=1)
def reconstruct(  # noqa: PLR0913  one parameter for each option
    root: Annotated[
        Path,
        typer.Argument(
            metavar="ROOT",
            help="A folder of checkpoints with averages: all tracks of all complete steps are snapshots.",
            show_default=False,
        ),
    ],
    *,
    out: NewFolderOption,
    sigma_rel: Annotated[
        float | None,
        typer.Option(metavar="S", help="The average that Power(sigma_rel=S) would have given.", show_default=False),
    ] = None,
    half_life: Annotated[
        float | None,
        typer.Option(
            metavar="H", help="The average that HalfLife(H) would have given; H in clock units.", show_default=False
        ),
    ] = None,
    window: Annotated[
        float | None,
        typer.Option(metavar="W", help="The mean over the last W; W in clock units.", show_default=False),
    ] = None,
    at: Annotated[
        int | None,
        typer.Option(
            metavar="STEP", help="The step at which to take the average; by default the newest one.", show_default=False
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, metavar="V", help="The maximum total variation; a worse fit is an error.")
    ] = 0.05,
    force: Annotated[bool, typer.Option("--force", help="Write the result even if it exceeds --tolerance.")] = False,
    dtype: DtypeOption = None,
    max_shard_size: ShardSizeOption = "5GiB",
    format: OutputFormatOption = OutputFormatChoice.SAFETENSORS,  # noqa: A002
    entry: EntryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write an average that is chosen after training, as a weighted sum of the averages in checkpoints.

    Prints the coefficient of each snapshot first, then the total variation between the wanted and the obtained weights
    of past values, and the amplification: the factor by which rounding errors of the snapshots can grow.

    If there is a track by Uniform(), a window needs only the two checkpoints nearest to its ends. The window between
    them is printed, and the tolerance applies to the window asked for. Buffers, and tensors without an average, come
    from the snapshot nearest to STEP. Averages with an unknown profile, and those saved before averaging restarted, are
    ignored.

    The keys of --json: snapshots (step, track, law, time, dtypes, coefficient of each), step, time, window (begin and
    end, or null), total_variation, amplification, notes, files (sizes in bytes by path).
    """
    from ema_dist.cli.reconstruct import Output, parse_target  # noqa: PLC0415
    from ema_dist.cli.reconstruct import reconstruct as run  # noqa: PLC0415

    try:
        target = parse_target(sigma_rel=sigma_rel, half_life=half_life, window=window)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    run(
        root,
        Output(out, format.value, dtype, max_shard_size),
        target,
        step=at,
        tolerance=tolerance,
        force=force,
        entry=entry,
        as_json=as_json,
    )


@app.command(name="import")
@report_errors(exit_code=1)
def import_averages(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A file or folder with averages that another package has stored.",
            show_default=False,
        ),
    ],
    *,
    out: NewFolderOption,
    kind: Annotated[
        ImportChoice,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="averaged-model, lightning, timm, diffusers, ema-pytorch, composer, torchtitan or nemo; by default it "
            "is told by the content.",
        ),
    ] = ImportChoice.AUTO,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="The weights of the model: its state_dict() in a file by torch.save; or safetensors, which have no "
            "order. Names averages without names, fills in tensors without an average, and tells parameters from "
            "buffers.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[  # noqa: A002
        ImportFormatChoice,
        typer.Option(help="Files of weights, or a folder that checkpoint.load takes under the key `ema`."),
    ] = ImportFormatChoice.SAFETENSORS,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="How many steps the averages cover, if SOURCE does not record it.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write averages by another package into files of weights, or into a folder that a ShardedEMA resumes from.

    Reads torch's AveragedModel, checkpoints of Lightning, timm, Composer, torchtitan and NeMo, and averages of
    diffusers and ema-pytorch. Nothing in them is run; pickles that cannot be read without running code are refused.

    With MODEL the tensors, their names, shapes and integer dtypes are checked, and second names of tied tensors are
    left out. --format dcp needs MODEL unless SOURCE tells parameters from buffers; it keeps the counts, and the
    averaging law if SOURCE records it. import.json in OUT says where the averages are from.

    The keys of --json: format, steps and updates (null if they are not recorded), law (null if it is not), names
    without_average, notes, files (sizes in bytes by path).
    """
    from ema_dist.cli.import_averages import import_averages as run  # noqa: PLC0415

    run(source, out, kind=kind.value, reference=reference, file_format=format.value, steps=steps, as_json=as_json)
