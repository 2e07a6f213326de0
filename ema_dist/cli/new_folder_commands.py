"""The arguments, options and help texts of the commands that write a new folder: merge, reconstruct and import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ema_dist.cli.options import (
    DecayChoice,
    DtypeOption,
    EntryOption,
    ImportChoice,
    ImportFormatChoice,
    JsonOption,
    NewFolderOption,
    OutputFormatChoice,
    OutputFormatOption,
    ShardSizeOption,
    TrackOption,
    WeightsChoice,
    parse_coefficients,
)
from ema_dist.cli.terminal import report_errors


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
            "is detected from the content.",
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
