"""``ema-dist merge``: writes a weighted mean of the weights in several checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ema_dist.checkpoint.combine.decay_coefficients import DecayShape
from ema_dist.checkpoint.combine.merging import make_terms, merge_notes, open_sources
from ema_dist.checkpoint.stored_checkpoint import WeightsKind
from ema_dist.checkpoint.weighted_sum.weighted_sum import Term, WeightedSum
from ema_dist.checkpoint.weighted_sum.write import RECORD_FILE, OutputFormat, require_new_folder, write_weighted_sum
from ema_dist.cli.terminal import (
    exit_on_sigterm,
    print_files,
    print_json,
    print_stderr,
    print_table,
    progress,
)


def merge(
    checkpoints: Sequence[Path],
    out: Path,
    *,
    coefficients: Sequence[float] | None = None,
    emulate_decay: DecayShape | None = None,
    weights_kind: WeightsKind = "live",
    track: str | None = None,
    entry: str | None = None,
    last: int | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GiB",
    file_format: OutputFormat = "safetensors",
    as_json: bool = False,
) -> None:
    """Prints the coefficients of the checkpoints, then writes their weighted mean, and prints the files.

    Raises: as `ema_dist.checkpoint.merge`.
    """
    require_new_folder(out)
    sources = open_sources(checkpoints, weights_kind, track=track, entry=entry, last=last)
    terms = make_terms(sources, coefficients=coefficients, emulate_decay=emulate_decay)
    weights = WeightedSum(terms, dtype=None if dtype is None else getattr(torch, dtype))
    notes = merge_notes(weights, file_format)
    with exit_on_sigterm(), _torchrun_group() as is_first:
        if is_first:
            for note in notes:
                print_stderr(f"note: {note}")
            if not as_json:
                _print_coefficients(terms)
        total = weights.input_nbytes // (dist.get_world_size() if dist.is_initialized() else 1)
        with progress("merging", total) as advance:
            paths = write_weighted_sum(
                weights,
                out,
                file_format=file_format,
                max_shard_size=max_shard_size,
                record={"notes": notes},
                on_bytes=advance if is_first else lambda _size: None,
            )
    if not is_first:
        return
    sizes = {str(path): path.stat().st_size for path in paths}
    if as_json:
        print_json({**json.loads((out / RECORD_FILE).read_text()), "files": sizes})
        return
    print_files(sizes)


def _print_coefficients(terms: Sequence[Term]) -> None:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("step", justify="right")
    table.add_column("coefficient", justify="right")
    table.add_column("checkpoint")
    for term in terms:
        step = "" if term.source.step is None else str(term.source.step)
        table.add_row(step, f"{term.coefficient:.6f}", escape(str(term.source.path)))
    print_table(table)


@contextmanager
def _torchrun_group() -> Iterator[bool]:
    """Creates a process group if torchrun started this process; yields whether this is the first process."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield not dist.is_initialized() or dist.get_rank() == 0
        return
    dist.init_process_group("gloo")
    yield dist.get_rank() == 0
    dist.barrier()  # skipped after an error, when torchrun ends the other processes
    dist.destroy_process_group()
