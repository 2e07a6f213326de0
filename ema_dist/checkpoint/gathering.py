"""Full averages in weight files: gathered from the shards of all ranks one tensor at a time, and scattered back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from ema_dist.checkpoint.agreement import (
    checkpoint_rendezvous,
    describe_rank_differences,
    gather_problems,
    run_on_all_ranks,
)
from ema_dist.checkpoint.entries import compared_counts
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.saving import wait
from ema_dist.checkpoint.weights.formats import FileFormat
from ema_dist.checkpoint.weights.reader import WeightReader
from ema_dist.checkpoint.weights.weight_writer import WeightWriter
from ema_dist.ema import ShardedEMA
from ema_dist.modes import in_normal_mode


@in_normal_mode
def gather(
    ema: ShardedEMA,
    folder: str | os.PathLike[str],
    *,
    track: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GiB",
    file_format: FileFormat = "safetensors",
    name: str | None = None,
    force: bool = False,
    timeout: float = 60.0,
) -> list[Path]:
    """Write the averaged model, all entries of ``ema.full_state_dict()``, to files that other libraries load.

    Args:
        folder: where rank 0 writes; ignored on other ranks. An earlier export in it stays until this one is complete.
        track: the track to write; None for the only one, or the one called ``default``.
        dtype: of floating-point tensors; None for the dtype of each live tensor.
        max_shard_size: bytes of tensors in a file, as a number or like ``"5GiB"``; a larger tensor gets its own file.
        file_format: ``"safetensors"``, or ``"torch"`` for files by ``torch.save``, which hold non-tensors too.
        name: the file name, such as ``"diffusion_pytorch_model.safetensors"``; if there are several files, they and
            their index are named after it. None for ``model.safetensors`` or ``pytorch_model.bin``.
        force: whether to overwrite weights that ema_dist did not write; its own are replaced in any case.
        timeout: seconds that ranks wait for each other at the start.

    Returns: the files, and last their index if there are several; an empty list on other ranks.

    Collective: over all ranks of the process group, whatever the layout.
    Memory: one file and one full tensor on rank 0, one full tensor elsewhere.
    Raises: CheckpointError on every rank when rank 0 cannot write, ``get_extra_state()`` raises, or the pending
        background save has failed; RuntimeError when a rank does not arrive in time; ValueError for an
        unknown track, for a dtype that the format cannot hold, and when ranks hold different models, as pipeline stages
        do: combine those with ``full_state_dict(pipeline=...)``.
    """
    wait()
    texts = {
        "track": f"track={track!r}",
        "dtype": f"dtype={dtype}",
        "max_shard_size": f"max_shard_size={max_shard_size!r}",
        "file_format": f"file_format={file_format!r}",
        "name": f"name={name!r}",
        "force": f"force={force}",
    }
    compared = [texts, *compared_counts(ema)]
    group = checkpoint_rendezvous("checkpoint.gather(ema, folder)", timeout=timeout, compared=compared)
    entries, planned = run_on_all_ranks(
        lambda: (ema.gather(dtype=dtype, track=track), ema.full_shapes(dtype=dtype)), group
    )
    if different := describe_rank_differences([*planned], group):
        raise ValueError(
            f"ranks hold different models: {different}; combine pipeline stages with "
            "ema.full_state_dict(pipeline=...), and write the result"
        )

    def make_writer() -> WeightWriter:
        return WeightWriter(
            folder,
            planned=planned,
            max_shard_size=max_shard_size,
            file_format=file_format,
            name=name,
            force=force,
        )

    writer = _make_on_first_rank(make_writer, group)

    def write_or_exhaust() -> list[Path]:
        if writer:
            return _write(writer, entries)
        _exhaust(entries)
        return []

    return run_on_all_ranks(write_or_exhaust, group)


@in_normal_mode
def scatter(ema: ShardedEMA, folder: str | os.PathLike[str], *, track: str | None = None) -> None:
    """Scatter averages from files of full tensors, such as `gather` writes, to the shards of all ranks.

    Live weights, frozen parameters and step counts do not change.

    Args:
        folder: a folder, a file or an index, on rank 0; ignored on other ranks.
        track: the track to replace; None for the only one, or the one called ``default``.

    Collective: over all ranks that hold the model. Memory: one full tensor on each rank.
    Raises: as ``ema.load_full_state_dict``: RuntimeError on every rank when the files cannot be read, caused by a
        CheckpointError on rank 0.
    """
    ema.load_full_state_dict(WeightReader(folder), track=track)


def _make_on_first_rank(make: Callable[[], WeightWriter], group: ProcessGroup | None) -> WeightWriter | None:
    """Return the result of ``make`` on the first rank, None elsewhere.

    Collective: over ``group``. Raises: ValueError on every rank when ``make`` raises.
    """
    writer, cause = None, None
    if group is None or group.rank() == 0:
        try:
            writer = make()
        except Exception as error:  # noqa: BLE001  every error must reach the other ranks
            cause = error
    if problems := gather_problems([str(cause)] if cause else [], group):
        raise ValueError("; ".join(problems)) from cause
    return writer


def _write(writer: WeightWriter, entries: Iterator[tuple[str, Any]]) -> list[Path]:
    try:
        with writer:
            for name, value in entries:
                writer.add(name, value)
    except Exception as error:
        _exhaust(entries)
        raise CheckpointError(f"cannot write into {writer.folder}: {type(error).__name__}: {error}") from error
    return writer.paths


def _exhaust(entries: Iterator[tuple[str, Any]]) -> None:
    """Iterate to the end: the other ranks wait in a collective call for each entry."""
    for _ in entries:
        pass
