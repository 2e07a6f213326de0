"""``ema-dist export``: writes the averaged or live weights of a checkpoint into files that other programs load."""

from __future__ import annotations

from pathlib import Path

import torch

from ema_dist.checkpoint.dcp.checkpoint_index import dotted_name
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.manifest import verify_files
from ema_dist.checkpoint.step_folders import locate
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint, WeightSelection, WeightsKind
from ema_dist.checkpoint.weights.files import WeightWriter
from ema_dist.checkpoint.weights.formats import FORMATS, FileFormat
from ema_dist.cli.terminal import format_bytes, print_stderr, progress, stdout_console
from ema_dist.messages import abbreviated


def export(
    checkpoint: Path,
    out: Path,
    *,
    weights_kind: WeightsKind = "ema",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    file_format: FileFormat = "safetensors",
    step: int | None = None,
    track: str | None = None,
    entry: str | None = None,
) -> None:
    """Writes the weights in a checkpoint into files in the folder ``out``, and prints their paths and sizes.

    Args:
        checkpoint: a root of checkpoints, one of its steps, or a folder that ``dcp.save`` wrote.
        dtype: the name in torch of a floating dtype, to which floating tensors are cast.

    Memory: one output file and one tensor.
    Raises: CheckpointError when the checkpoint is damaged or has no such weights, OSError when ``out`` cannot be
        written; no file is left in ``out`` then.
    """
    stored = StoredCheckpoint(locate(checkpoint, step))
    cast_dtype = None if dtype is None else getattr(torch, dtype)
    selection = stored.weights(weights_kind, track=track, entry=entry, dtype=cast_dtype)
    _print_caveats(stored, selection)
    planned = stored.meta_tensors(selection)
    writer = WeightWriter(out, planned=planned, max_shard_size=max_shard_size, file_format=file_format)
    total = sum(stored.index.nbytes(source) for source, _ in selection.sources.values())
    with writer:
        with progress("exporting", total) as advance:
            for name, tensor in stored.read_weights(selection, on_bytes=advance):
                _add(writer, name, tensor)
        if FORMATS[file_format].keeps_non_tensors:
            for name, parts in selection.extra_states.items():
                _add(writer, name, stored.extra_state(parts))
        # Before the block ends, which publishes the files; the disk still writes the last one meanwhile.
        _require_intact(stored)
    for path in writer.paths:
        stdout_console().print(f"{path}  {format_bytes(path.stat().st_size)}", soft_wrap=True)


def _require_intact(stored: StoredCheckpoint) -> None:
    """Raises: CheckpointError when the checksum of one of the checkpoint's files differs from the manifest."""
    files = stored.manifest.files if stored.manifest else {}
    with progress("checksums", sum(record.size for record in files.values())) as advance:
        if problems := verify_files(stored.folder, files, on_bytes=advance):
            raise CheckpointError(f"the checkpoint is damaged, nothing is exported: {'; '.join(problems)}")


def _add(writer: WeightWriter, name: str, value: object) -> None:
    """Adds an entry; an error of the file system, which may name no file, is raised again with the folder."""
    try:
        writer.add(name, value)
    except OSError as error:
        raise OSError(f"{writer.folder} cannot be written (is the disk full?): {error}") from error


def _print_caveats(stored: StoredCheckpoint, selection: WeightSelection) -> None:
    """Prints on stderr what a user may not expect of these weights."""
    if selection.is_model_missing:
        model_names = ", ".join(repr(dotted_name(key_path)) for key_path in stored.index.models)
        with_names = f" with the names of these averages (it holds {model_names})" if model_names else ""
        print_stderr(
            f"{stored.folder} holds no live model{with_names}: the averages are exported, and nothing that has none"
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
            f"{len(unexplained)} tensors have no average and are exported with their live values (frozen ones, or "
            f"second names of tied ones: the checkpoint does not tell): {abbreviated(unexplained)}"
        )
    if ties := selection.guessed_ties:
        pairs = [f"{name} (that of {first})" for name, first in ties.items()]
        print_stderr(
            f"{len(pairs)} tensors are exported with the average of another, whose live values they equal (tied ones, "
            f"most likely: the checkpoint does not tell): {abbreviated(pairs)}"
        )
