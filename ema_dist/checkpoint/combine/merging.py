"""Merging: a weighted mean of the weights in several checkpoints, of any layouts, numbers of ranks and formats."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from ema_dist.checkpoint.combine.decay_coefficients import (
    DecayShape,
    check_coefficients,
    decay_coefficients,
    uniform_coefficients,
)
from ema_dist.checkpoint.find_checkpoint import expand_steps
from ema_dist.checkpoint.stored_checkpoint import WeightsKind
from ema_dist.checkpoint.weighted_sum.output_formats import left_out_note
from ema_dist.checkpoint.weighted_sum.source import WeightSource, open_source
from ema_dist.checkpoint.weighted_sum.weighted_sum import Term, WeightedSum
from ema_dist.checkpoint.weighted_sum.write import OutputFormat, write_weighted_sum
from ema_dist.messages import abbreviated

_log = logging.getLogger(__name__)


def merge(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    coefficients: Sequence[float] | None = None,
    emulate_decay: DecayShape | None = None,
    weights: WeightsKind = "live",
    track: str | None = None,
    entry: str | None = None,
    last: int | None = None,
    dtype: torch.dtype | None = None,
    file_format: OutputFormat = "safetensors",
    max_shard_size: int | str = "5GiB",
    timeout: float = 60.0,
) -> list[Path]:
    """Write the weighted mean of the weights in several checkpoints into a new folder; return its files.

    Floating-point tensors of 16 bits or fewer are accumulated in float32, all others in float64. Integer tensors and
    extra states come from the last source. ``merge.json`` beside the weights has the path, step, coefficient and
    checksum of each source, and warnings about the result, which are logged too.

    Args:
        sources: one or several checkpoints saved by `save` or ``dcp.save``, or files or folders of full weights. A root
            of steps means all its steps, oldest first.
        folder: must not exist.
        coefficients: one for each checkpoint, with the sum 1; None for the mean.
        emulate_decay: choose coefficients that emulate a decay of the learning rate over the sources, oldest first.
        weights: ``"live"`` weights or the averages, ``"ema"``; files hold one kind only.
        track: the track of the averages; None for the only one, or the one called ``default``.
        entry: dotted name of the entry of the model or of its averages, if a checkpoint holds several.
        last: use only the last ``last`` sources.
        dtype: of floating-point tensors; None for that of each live weight in the last source.
        file_format: ``"safetensors"`` or ``"torch"`` files in the Hugging Face layout, or ``"dcp"``: a folder that
            `load` takes under the key ``model``.
        max_shard_size: bytes of tensors in a file, as a number or like ``"5GiB"``; a larger tensor gets its own file.
        timeout: seconds that ranks wait for each other at the start.

    Collective: over all ranks, if there is a process group; all ranks must pass the same arguments. They share the
        tensors.
    Memory: the sum of one batch (16 MiB, or one larger tensor) and that batch from one source; with ``"torch"``, also
        one output file.
    Raises: CheckpointError on every rank when a source is damaged or lacks such weights, sources are not of the same
        model, or ``folder`` exists or cannot be written; ValueError for coefficients that do not match.
    """
    paths = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    opened = open_sources(map(Path, paths), weights, track=track, entry=entry, last=last)
    terms = make_terms(opened, coefficients=coefficients, emulate_decay=emulate_decay)
    weighted_sum = WeightedSum(terms, dtype=dtype)
    notes = merge_notes(weighted_sum, file_format)
    for note in notes if not dist.is_initialized() or dist.get_rank() == 0 else ():
        _log.info(note)
    return write_weighted_sum(
        weighted_sum,
        folder,
        file_format=file_format,
        max_shard_size=max_shard_size,
        record={"notes": notes},
        timeout=timeout,
    )


def open_sources(
    paths: Iterable[Path],
    weights_kind: WeightsKind,
    *,
    track: str | None = None,
    entry: str | None = None,
    last: int | None = None,
) -> list[WeightSource]:
    """Open the weights in checkpoints and files; a root means all its steps, oldest first.

    Raises: CheckpointError when there are no such weights; ValueError without a path or for a ``last`` out of range.
    """
    steps_and_folders = [pair for path in paths for pair in expand_steps(path)]
    count = len(steps_and_folders)
    if not count:
        raise ValueError("expected at least one checkpoint, got none")
    if last is not None and not 1 <= last <= count:
        raise ValueError(f"expected last between 1 and {count}, the number of checkpoints, got {last}")
    sources: list[WeightSource] = []
    for step, folder in steps_and_folders[-(last or count) :]:
        source = open_source(folder, weights_kind, track=track, entry=entry)
        source.step = step if source.step is None else source.step
        sources.append(source)
    return sources


def make_terms(
    sources: Sequence[WeightSource],
    *,
    coefficients: Sequence[float] | None = None,
    emulate_decay: DecayShape | None = None,
) -> list[Term]:
    """Pair the sources, oldest first, with their coefficients, by default those of the mean.

    Raises: ValueError when coefficients do not match in number or sum, or when both arguments are given.
    """
    if coefficients is not None and emulate_decay is not None:
        raise ValueError("pass either coefficients or emulate_decay, not both")
    count = len(sources)
    if coefficients is not None:
        chosen = check_coefficients(coefficients, count)
    elif emulate_decay is not None:
        chosen = decay_coefficients(emulate_decay, count)
    else:
        chosen = uniform_coefficients(count)
    return [Term(source, coefficient) for source, coefficient in zip(sources, chosen, strict=True)]


def merge_notes(weights: WeightedSum, file_format: str) -> list[str]:
    """Warnings about the sources of a merge, and notes on what is written for values that cannot be added."""
    sources = [term.source for term in weights.terms]
    last = weights.base
    notes = [caveat for source in sources for caveat in source.caveats]
    steps = [source.step for source in sources if source.step is not None]
    if any(step > following for step, following in pairwise(steps)):
        notes.append(f"the checkpoints are not in the order of their steps: {abbreviated(map(str, steps))}")
    left_out = left_out_note(last.extra_states, file_format)
    copied = [name for name in last.meta_tensors if name not in weights.added_names]
    if others := copied if left_out else copied + last.extra_states:
        notes.append(
            f"{len(others)} integer tensors and extra states are copied from the last checkpoint: {abbreviated(others)}"
        )
    notes += left_out
    lost = {name for source in sources for name in source.extra_states} - {*last.extra_states}
    if lost:
        notes.append(f"extra states that the last checkpoint lacks are left out: {abbreviated(sorted(lost))}")
    if untied := sorted({name for source in sources for name in source.ties} - weights.ties.keys()):
        notes.append(
            f"{len(untied)} tensors are tied in some checkpoints only, so each gets its own sum and the result does "
            f"not tie them: {abbreviated(untied)}. A model that ties them keeps the values of one name"
        )
    if weights.ties:
        pairs = [f"{name} (that of {first})" for name, first in weights.ties.items()]
        notes.append(f"{len(pairs)} tied tensors get the values of the tensor they are tied to: {abbreviated(pairs)}")
    return notes
