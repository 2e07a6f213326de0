"""``ema-dist reconstruct``: writes an average chosen after training, from the averages in a root of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ema_dist.checkpoint.combine.reconstruction import (
    Reconstruction,
    caveats,
    choose_snapshots,
    describe,
    input_nbytes,
    open_snapshots,
    require_within_tolerance,
    weighted_sum,
    write_reconstruction,
)
from ema_dist.checkpoint.combine.snapshots import Snapshot
from ema_dist.checkpoint.weighted_sum.write import OutputFormat, require_new_folder
from ema_dist.cli.terminal import (
    exit_on_sigterm,
    print_files,
    print_json,
    print_stderr,
    print_table,
    progress,
    stdout_console,
)
from ema_dist.posthoc import Window
from ema_dist.schedules.laws import HalfLife, Power
from ema_dist.schedules.schedule import Schedule


@dataclass(frozen=True)
class Output:
    """The folder into which the average is written, and the format of its files."""

    folder: Path
    file_format: OutputFormat
    dtype: str | None
    max_shard_size: int | str


def reconstruct(
    root: Path,
    output: Output,
    target: Schedule | Window,
    *,
    step: int | None,
    tolerance: float,
    force: bool,
    entry: str | None,
    as_json: bool,
) -> None:
    """Prints the coefficients of snapshots and how good they are, then writes their sum.

    Args:
        step: the step at which the average is taken; None for the last one.
        tolerance: the maximum total variation; ``force`` ignores it.

    Raises: as `ema_dist.checkpoint.reconstruct`.
    """
    require_new_folder(output.folder)
    snapshots = open_snapshots(root, entry=entry)
    reconstruction = choose_snapshots(snapshots, target, step=step)
    notes = snapshots.notes + caveats(reconstruction, output.file_format, entry=entry)
    for note in notes:
        print_stderr(f"note: {note}")
    if not as_json:
        _print(reconstruction, target)
    if not force:
        require_within_tolerance(reconstruction, snapshots, tolerance=tolerance)
    dtype = None if output.dtype is None else getattr(torch, output.dtype)
    weights = weighted_sum(reconstruction, entry=entry, dtype=dtype)
    with exit_on_sigterm(), progress("reconstructing", input_nbytes(reconstruction, weights)) as advance:
        paths = write_reconstruction(
            reconstruction,
            weights,
            output.folder,
            file_format=output.file_format,
            max_shard_size=output.max_shard_size,
            notes=notes,
            on_bytes=advance,
        )
    sizes = {str(path): path.stat().st_size for path in paths}
    if as_json:
        print_json(
            {
                "snapshots": [*_rows(reconstruction)],
                **describe(reconstruction),
                "notes": notes,
                "files": sizes,
            }
        )
        return
    print_files(sizes)


def parse_target(*, sigma_rel: float | None, half_life: float | None, window: float | None) -> Schedule | Window:
    """The target that the one option given describes.

    Raises: ValueError for none or several, and for numbers out of range.
    """
    options = {"--sigma-rel": sigma_rel, "--half-life": half_life, "--window": window}
    if len(given := [name for name, value in options.items() if value is not None]) != 1:
        raise ValueError(f"expected one of {', '.join(options)}, got {' and '.join(given) or 'none'}")
    if sigma_rel is not None:
        return Power(sigma_rel=sigma_rel)
    if half_life is not None:
        return HalfLife(half_life)
    assert window is not None
    return Window(window)


def _rows(reconstruction: Reconstruction) -> Iterator[dict[str, Any]]:
    """The printed values of each snapshot."""
    for snapshot, coefficient in zip(reconstruction.snapshots, reconstruction.fit.coefficients, strict=True):
        yield {
            "step": snapshot.step,
            "track": snapshot.track,
            "law": snapshot.law,
            "time": snapshot.profile.end,
            "dtypes": _average_dtypes(snapshot),
            "coefficient": coefficient,
        }


def _average_dtypes(snapshot: Snapshot) -> list[str]:
    names = snapshot.averages.tracks[snapshot.track].averages.values()
    return sorted({str(snapshot.stored.index.dtype(name)).removeprefix("torch.") for name in names})


def _print(reconstruction: Reconstruction, target: Schedule | Window) -> None:
    table = Table(box=SIMPLE_HEAD)
    for heading in ("step", "track", "law", "time", "dtype", "coefficient"):
        table.add_column(heading, justify="left" if heading in {"track", "law", "dtype"} else "right")
    for row in _rows(reconstruction):
        table.add_row(
            str(row["step"]),
            escape(row["track"]),
            escape(row["law"]),
            f"{row['time']:g}",
            ", ".join(row["dtypes"]),
            f"{row['coefficient']:+.6f}",
        )
    print_table(table)
    fit = reconstruction.fit
    lines = [
        f"target          {target!r} at step {reconstruction.step}, {reconstruction.time:g} since averaging began",
        f"total variation {fit.total_variation:.4f}",
        f"amplification   {fit.amplification:.2f}  (times the rounding of the snapshots)",
    ]
    if reconstruction.window is not None:
        begin, end = reconstruction.window
        lines.insert(1, f"actual window   {end - begin:g}, from {begin:g} to {end:g}")
    for line in lines:
        stdout_console().print(line, markup=False, soft_wrap=True)
