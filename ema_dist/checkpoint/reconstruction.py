"""Chooses the snapshots and coefficients that make a profile, says how good they are, and writes their sum."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ema_dist.checkpoint.checkpoint_folder import find_checkpoint, find_steps, step_in_name
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.manifest import verify_files
from ema_dist.checkpoint.snapshots import Snapshot, Snapshots, read_snapshots
from ema_dist.checkpoint.sum_writing import SumFormat, write_weighted_sum
from ema_dist.checkpoint.weight_source import CheckpointSource
from ema_dist.checkpoint.weighted_sum import Term, WeightedSum
from ema_dist.messages import abbreviated
from ema_dist.modes import in_normal_mode
from ema_dist.posthoc.fitting import Fit, fit_profiles, judge
from ema_dist.posthoc.profiles import PowerProfile, Profile, Window, WindowProfile, profile_of
from ema_dist.schedules.schedule import Schedule

NEGLIGIBLE_COEFFICIENTS = 1e-3
"""Snapshots whose absolute coefficients together are below this are left out: each one costs reading a whole model."""


@dataclass(frozen=True)
class Reconstruction:
    """The snapshots of a wanted profile with their coefficients."""

    snapshots: list[Snapshot]
    fit: Fit
    step: int
    """The step that it is meant for."""
    time: float
    """The time of that step since averaging began."""
    window: tuple[float, float] | None = None
    """The times between which it is exactly the mean, if it is the difference of two uniform averages."""

    @property
    def nearest(self) -> Snapshot:
        """The snapshot nearest to the wanted step, and of these the one with the largest coefficient."""
        weighed = zip(self.snapshots, self.fit.coefficients, strict=True)
        return min(weighed, key=lambda pair: (abs(pair[0].step - self.step), -abs(pair[1])))[0]


def choose_snapshots(snapshots: Snapshots, target: Schedule | Window, *, step: int | None = None) -> Reconstruction:
    """Find the weighted sum of averages that comes closest to ``target`` at a step, the last one by default.

    A window is taken from a uniform track if there is one: from the two checkpoints nearest to its ends, or from one if
    it reaches back to the beginning. Everything else is a least-squares fit to the snapshots up to the step.

    Raises: CheckpointError for a step outside of those stored, and when there are too few snapshots; ValueError for a
        target without an exact profile, or a window that is longer than the time since averaging began.
    """
    step = snapshots.found[-1].step if step is None else step
    time = snapshots.time_of(step)
    wanted = profile_of(target, time)
    uniform = [snapshot for snapshot in snapshots.found if _is_uniform(snapshot.profile)]
    if isinstance(wanted, WindowProfile) and uniform:
        return _difference_of_means(uniform, wanted, step)
    candidates = [snapshot for snapshot in snapshots.found if snapshot.step <= step]
    fit = fit_profiles([snapshot.profile for snapshot in candidates], wanted)
    chosen = _without_negligible(candidates, fit.coefficients)
    return Reconstruction(chosen, fit_profiles([snapshot.profile for snapshot in chosen], wanted), step, time)


def _difference_of_means(uniform: Sequence[Snapshot], wanted: WindowProfile, step: int) -> Reconstruction:
    """The mean over ``(a, b]`` is ``(b * mean_b - a * mean_a) / (b - a)``, whose means begin at time 0.

    Source: icefall's ``average_checkpoints_with_averaged_model``.
    """
    last = min(uniform, key=lambda snapshot: abs(snapshot.profile.end - wanted.end))
    earlier = [snapshot for snapshot in uniform if snapshot.profile.end < last.profile.end]
    first = min(earlier, key=lambda snapshot: abs(snapshot.profile.end - wanted.begin), default=None)
    if first is None or wanted.begin <= abs(first.profile.end - wanted.begin):
        chosen, coefficients, begin = [last], [1.0], 0.0
    else:
        begin, end = first.profile.end, last.profile.end
        chosen, coefficients = [first, last], [-begin / (end - begin), end / (end - begin)]
    fit = judge([snapshot.profile for snapshot in chosen], coefficients, wanted)
    return Reconstruction(chosen, fit, step, wanted.end, window=(begin, last.profile.end))


def _is_uniform(profile: Profile) -> bool:
    return isinstance(profile, PowerProfile) and profile.gamma == 0


def _without_negligible(candidates: Sequence[Snapshot], coefficients: Sequence[float]) -> list[Snapshot]:
    by_size = sorted(zip(coefficients, candidates, strict=True), key=lambda pair: abs(pair[0]))
    negligible, total = 0, 0.0
    for coefficient, _ in by_size:
        total += abs(coefficient)
        if total >= NEGLIGIBLE_COEFFICIENTS:
            break
        negligible += 1
    kept = {id(snapshot) for _, snapshot in by_size[negligible:]}
    return [snapshot for snapshot in candidates if id(snapshot) in kept]


@in_normal_mode
def reconstruct(
    root: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    target: Schedule | Window,
    *,
    step: int | None = None,
    tolerance: float = 0.05,
    dtype: torch.dtype | None = None,
    file_format: SumFormat = "safetensors",
) -> Fit:
    """Write the average that ``target`` would have given, as a weighted sum of the averages in a root of checkpoints.

    Snapshots may have been saved by different numbers of ranks and from different layouts. Tensors without an average,
    and buffers, are those of the snapshot nearest to ``step``.

    Args:
        root: a folder of checkpoints, each with averages by `Power`, `Uniform`, `HalfLife` without a ramp, or a number
            taken once in each unit of the clock; of `checkpoint.save` or of ``dcp.save``.
        folder: must not exist.
        target: one of these laws, or `posthoc.Window`, in the unit of the clock since averaging began.
        step: the checkpoint at whose time the average is meant; by default the last one.
        tolerance: the largest total variation between the wanted and the obtained weights of past values.
        dtype: of floating-point tensors; None for that of the live weights, or of the averages where these are missing.
        file_format: ``"safetensors"``, ``"torch"``, or ``"dcp"``, which `checkpoint.load` takes under ``model``.

    Returns: the coefficients of the snapshots that were used, the total variation, and the amplification of rounding.

    Collective: no; one process, without a process group, or every rank of one with the same arguments, which share the
        work. Memory: a few batches of 16 MiB or larger tensors; with ``"torch"`` one file.
    Raises: CheckpointError when snapshots are damaged, too few, of different models, or end before ``step``, when no
        combination is within the tolerance, and when ``folder`` exists; ValueError for a target without an exact
        profile. Nothing is written then.
    """
    snapshots = open_snapshots(Path(root))
    reconstruction = choose_snapshots(snapshots, target, step=step)
    require_close(reconstruction, snapshots, tolerance=tolerance)
    write_reconstruction(reconstruction, Path(folder), dtype=dtype, file_format=file_format)
    return reconstruction.fit


def open_snapshots(root: Path, *, entry: str | None = None) -> Snapshots:
    """The averages in every step of a root, or in one checkpoint. Raises: as `read_snapshots`."""
    if steps := find_steps(root):
        return read_snapshots([(step, find_checkpoint(root, step)) for step in steps], entry=entry)
    folder = find_checkpoint(root)
    return read_snapshots([(step_in_name(folder) or 0, folder)], entry=entry)


def require_close(reconstruction: Reconstruction, snapshots: Snapshots, *, tolerance: float) -> None:
    """Raises: CheckpointError when the total variation is above ``tolerance``."""
    fit = reconstruction.fit
    if fit.total_variation > tolerance:
        steps = sorted({snapshot.step for snapshot in snapshots.found})
        nearest = sorted(sorted(steps, key=lambda stored: abs(stored - reconstruction.step))[:5])
        raise CheckpointError(
            f"the closest profile differs from the wanted one by a total variation of {fit.total_variation:.3f}, above "
            f"the tolerance of {tolerance:g}; the stored steps nearest to {reconstruction.step} are "
            f"{abbreviated(map(str, nearest))}. Keep more snapshots, take a wider profile, or pass --force"
        )


def write_reconstruction(
    reconstruction: Reconstruction,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    file_format: SumFormat = "safetensors",
    max_shard_size: int | str = "5GiB",
    entry: str | None = None,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> list[Path]:
    """Write the sum of the snapshots, and ``reconstruct.json`` with their paths, tracks and coefficients.

    Raises: CheckpointError when a snapshot is damaged or of another model, or when the folder exists or cannot be
        written. Memory and Collective: as `write_weighted_sum`.
    """
    _require_intact(reconstruction, on_bytes)
    nearest = reconstruction.snapshots.index(reconstruction.nearest)
    selections = [it.stored.weights("ema", track=it.track, entry=entry) for it in reconstruction.snapshots]
    terms = [
        Term(CheckpointSource(snapshot.stored, selection), coefficient)
        for snapshot, selection, coefficient in zip(
            reconstruction.snapshots, selections, reconstruction.fit.coefficients, strict=True
        )
    ]
    averaged = {*reconstruction.nearest.averages.tracks[reconstruction.nearest.track].averages.values()}
    copied = {name for name, (dcp_name, _) in selections[nearest].sources.items() if dcp_name not in averaged}
    weights = WeightedSum(terms, copied_from=nearest, copied=copied, dtype=dtype)
    return write_weighted_sum(
        weights,
        folder,
        file_format=file_format,
        max_shard_size=max_shard_size,
        record={"tracks": [snapshot.track for snapshot in reconstruction.snapshots], **describe(reconstruction)},
        record_name="reconstruct.json",
        on_bytes=on_bytes,
    )


def caveats(reconstruction: Reconstruction, *, entry: str | None = None) -> list[str]:
    """What a user may not expect of the tensors that are written, from the snapshot that decides about their names."""
    nearest = reconstruction.nearest
    source = CheckpointSource(nearest.stored, nearest.stored.weights("ema", track=nearest.track, entry=entry))
    # Its own share of the starting weights says nothing about that of the sum.
    return [it for it in source.caveats if it != nearest.averages.describe_initial_weights(nearest.track)]


def input_nbytes(reconstruction: Reconstruction) -> int:
    """The bytes that `write_reconstruction` reads: the files for their checksums, and the tensors."""
    stored = {id(snapshot.stored): snapshot.stored for snapshot in reconstruction.snapshots}.values()
    files = [record.size for it in stored if it.manifest for record in it.manifest.files.values()]
    tensors = [
        snapshot.stored.index.nbytes(name)
        for snapshot in reconstruction.snapshots
        for name in snapshot.averages.tracks[snapshot.track].averages.values()
    ]
    return sum(files) + sum(tensors)


def _require_intact(reconstruction: Reconstruction, on_bytes: Callable[[int], object]) -> None:
    """Raises: CheckpointError when a file of a snapshot differs from its manifest."""
    for stored in {id(snapshot.stored): snapshot.stored for snapshot in reconstruction.snapshots}.values():
        files = stored.manifest.files if stored.manifest else {}
        if problems := verify_files(stored.folder, files, on_bytes=on_bytes):
            raise CheckpointError(f"a snapshot is damaged, nothing is written: {'; '.join(problems)}")


def describe(reconstruction: Reconstruction) -> dict[str, Any]:
    """What a reconstruction is meant for and how good it is, as JSON."""
    return {
        "step": reconstruction.step,
        "time": reconstruction.time,
        "window": reconstruction.window,
        "total_variation": reconstruction.fit.total_variation,
        "amplification": reconstruction.fit.amplification,
    }
