"""Full averages in files of weights: from everyone's shards by stream, and back into shards."""

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
    run_on_first_rank,
)
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.saving import wait
from ema_dist.checkpoint.weights.files import WeightFiles, WeightWriter
from ema_dist.checkpoint.weights.formats import FileFormat
from ema_dist.ema import ShardedEMA


def gather(
    ema: ShardedEMA,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    file_format: FileFormat = "safetensors",
    timeout: float = 60.0,
) -> list[Path]:
    """Write the averaged model from rank 0 into files that others load: the entries of ``ema.full_state_dict()``.

    Args:
        folder: of rank 0, other ranks' is not looked at; an earlier export in it stays until the new one is complete.
        dtype: of floating tensors; None for the dtype of each live one.
        max_shard_size: bytes of tensors in a file, as a number or like ``"5GB"``; one larger tensor has its own file.
        file_format: ``"safetensors"``, or ``"torch"`` for files by ``torch.save``, which also hold what is no tensor.
        timeout: seconds that ranks wait for each other at the start.

    Returns: the files, and their index last if they are several; nothing on the other ranks.

    Collective: over all ranks of the process group, whatever the layout.
    Memory: one file and one full tensor on rank 0, one full tensor elsewhere.
    Raises: CheckpointError on every rank when rank 0 cannot write, or when a save in the background, which is waited
        for, has failed; RuntimeError when ranks do not come; ValueError for
        a dtype that the format cannot hold, and where ranks hold different models, as pipeline stages do: unite those
        by ``full_state_dict(pipeline=...)``.
    """
    wait()
    group = checkpoint_rendezvous("gather(ema, folder)", timeout=timeout)
    entries = ema.gather(dtype=dtype)
    planned = ema.full_shapes(dtype=dtype)
    if different := describe_rank_differences([*planned], group):
        raise ValueError(
            f"ranks hold different models: {different}; unite pipeline stages by ema.full_state_dict(pipeline=...), "
            "and write that"
        )
    writer = _make_on_first_rank(
        lambda: WeightWriter(folder, planned=planned, max_shard_size=max_shard_size, file_format=file_format), group
    )
    if writer is None:
        _exhaust(entries)
    paths = run_on_first_rank(lambda: _write(writer, entries) if writer else [], group)
    return paths if writer else []


def scatter(ema: ShardedEMA, folder: str | os.PathLike[str]) -> None:
    """Take averages over from files of full tensors, such as `gather` writes: an export, a file, an index.

    Live weights, frozen parameters and counts stay as they are. Other ranks' ``folder`` is not looked at.

    Collective: over all ranks that hold the model. Memory: one full tensor on each rank.
    Raises: as ``ema.load_full_state_dict``, which is RuntimeError on every rank for files that cannot be read, caused
        by a CheckpointError on rank 0.
    """
    ema.load_full_state_dict(WeightFiles(folder))


def _make_on_first_rank(make: Callable[[], WeightWriter], group: ProcessGroup | None) -> WeightWriter | None:
    """What ``make`` returns on the first rank; None elsewhere.

    Collective: over ``group``. Raises: ValueError on every rank when it raises one, or TypeError.
    """
    writer, cause = None, None
    if group is None or group.rank() == 0:
        try:
            writer = make()
        except (TypeError, ValueError) as error:
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
        raise CheckpointError(f"{writer.folder} cannot be written: {type(error).__name__}: {error}") from error
    return writer.paths


def _exhaust(entries: Iterator[tuple[str, Any]]) -> None:
    """Help the other ranks to the end: they are in collective calls."""
    for _ in entries:
        pass
