"""``ema-dist export``: the weights in a checkpoint, averaged or live, as files that others load."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from ema_dist.checkpoint.dcp.index import dotted_name
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.manifest import verify_files
from ema_dist.checkpoint.step_folders import locate
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint, WeightSelection
from ema_dist.checkpoint.weights.files import WeightWriter, size_in_bytes
from ema_dist.cli.options import CheckpointArgument, EntryOption, StepOption, TrackOption, WeightsChoice, WeightsOption
from ema_dist.cli.terminal import format_bytes, print_stderr, progress, stdout_console
from ema_dist.messages import abbreviated


class FormatChoice(str, Enum):
    """What files to write."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"


DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "double", "float", "half")
}
"""The dtypes that weights can be cast to, by their names."""


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """The floating dtype of that name.

    Raises: typer.BadParameter when there is none.
    """
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise typer.BadParameter(f"{name!r} is no floating dtype to cast to: choose one of {', '.join(DTYPES)}")
    return dtype


def parse_size(text: str) -> str:
    """The same text, which says how many bytes.

    Raises: typer.BadParameter when it is no size.
    """
    try:
        size_in_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def export(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write into.", show_default=False)],
    *,
    weights: WeightsOption = WeightsChoice.EMA,
    dtype: Annotated[
        torch.dtype | None,
        typer.Option(
            parser=parse_dtype,
            metavar="DTYPE",
            help="Of floating tensors, such as bfloat16; that of each live one otherwise.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str,
        typer.Option(parser=parse_size, metavar="SIZE", help="Of the tensors in one file: bytes, or as in 500MB."),
    ] = "5GB",
    format: Annotated[FormatChoice, typer.Option(help="What files to write.")] = FormatChoice.SAFETENSORS,  # noqa: A002
    step: StepOption = None,
    track: TrackOption = None,
    entry: EntryOption = None,
) -> None:
    """Write the averaged (or live) weights of a checkpoint into files in the Hugging Face layout.

    One process, by stream: at most one output file and one tensor are in memory. Nothing is written unless all is well,
    the checksums of the checkpoint's files included; an earlier export of the same format in OUT is replaced then.
    """
    stored = StoredCheckpoint(locate(checkpoint, step))
    selection = stored.weights(weights.value, track=track, entry=entry, dtype=dtype)
    _print_caveats(stored, selection)
    planned = stored.meta_tensors(selection)
    writer = WeightWriter(out, planned=planned, max_shard_size=max_shard_size, file_format=format.value)
    total = sum(stored.index.nbytes(source) for source, _ in selection.sources.values())
    with writer:
        with progress("exporting", total) as advance:
            for name, tensor in stored.read_weights(selection, on_bytes=advance):
                _add(writer, name, tensor)
        if format is FormatChoice.TORCH:
            for name, parts in selection.extra_states.items():
                _add(writer, name, stored.extra_state(parts))
        _require_intact(stored)  # while the disk takes the last file
    for path in writer.paths:
        stdout_console().print(f"{path}  {format_bytes(path.stat().st_size)}", soft_wrap=True)


def _require_intact(stored: StoredCheckpoint) -> None:
    files = stored.manifest.files if stored.manifest else {}
    with progress("checksums", sum(file.size for file in files.values())) as advance:
        if problems := verify_files(stored.folder, files, on_bytes=advance):
            raise CheckpointError(f"the checkpoint is damaged, nothing is exported: {'; '.join(problems)}")


def _add(writer: WeightWriter, name: str, value: object) -> None:
    try:
        writer.add(name, value)
    except OSError as error:
        raise OSError(f"{writer.folder} cannot be written (is the disk full?): {error}") from error


def _print_caveats(stored: StoredCheckpoint, selection: WeightSelection) -> None:
    """Say what a user would not expect of these weights."""
    if selection.is_model_missing:
        others = ", ".join(repr(dotted_name(key_path)) for key_path in stored.index.models)
        of_these = f" with the names of these averages (it holds {others})" if others else ""
        print_stderr(
            f"{stored.folder} holds no live model{of_these}: the averages are exported, and nothing that has none"
        )
    if selection.averages and selection.averages.is_stale:
        print_stderr(f"the averages saw {selection.averages.steps} steps, and no average was taken yet")
    if trained := [name for name in selection.without_average if name in stored.index.optimized_names]:
        print_stderr(
            f"{len(trained)} tensors that an optimizer in the checkpoint trains have no average and are exported with "
            f"their live values: {abbreviated(trained)}"
        )
    unexplained = [name for name in selection.without_average if name not in trained]
    if unexplained and not stored.manifest:
        print_stderr(
            f"{len(unexplained)} tensors have no average and are exported with their live values (frozen ones, or second "
            f"names of tied ones: the checkpoint does not tell): {abbreviated(unexplained)}"
        )
    if ties := selection.guessed_ties:
        pairs = [f"{name} (that of {first})" for name, first in ties.items()]
        print_stderr(
            f"{len(pairs)} tensors are exported with the average of another, whose live values they equal (tied ones, "
            f"most likely: the checkpoint does not tell): {abbreviated(pairs)}"
        )
