"""Chooses the snapshots and coefficients that fit a profile, measures the fit, and writes their sum."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ema_dist.checkpoint.combine.snapshots import Snapshot, Snapshots, read_snapshots
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.find_checkpoint import checkpoints_by_step, find_checkpoint, step_in_name
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint, WeightSelection
from ema_dist.checkpoint.weighted_sum.output_formats import left_out_note
from ema_dist.checkpoint.weighted_sum.source import CheckpointSource
from ema_dist.checkpoint.weighted_sum.weighted_sum import Term, WeightedSum
from ema_dist.checkpoint.weighted_sum.write import OutputFormat, write_weighted_sum
from ema_dist.messages import abbreviated
from ema_dist.modes import in_normal_mode
from ema_dist.posthoc.fitting import Fit, evaluate_coefficients, fit_profiles
from ema_dist.posthoc.profiles import PowerProfile, Profile, Window, WindowProfile, profile_of
from ema_dist.schedules.schedule import Schedule

_log = logging.getLogger(__name__)

NEGLIGIBLE_COEFFICIENTS = 1e-3
"""Snapshots are dropped while the sum of their absolute coefficients stays below this: reading one costs as much as
reading a model."""


@dataclass(frozen=True)
class Reconstruction:
    """The snapshots and coefficients whose sum is closest to the target profile."""

    snapshots: list[Snapshot]
    fit: Fit
    nearest: Snapshot
    """The snapshot nearest to the target step, whether or not it is in the sum. Buffers and weights without an average
    come from it."""
    step: int
    """The step at which the target average is taken."""
    time: float
    """The time of that step since averaging began."""
    window: tuple[float, float] | None = None
    """Start and end of the window actually averaged; None unless the target is a window over a Uniform track."""

    @property
    def terms(self) -> list[tuple[Snapshot, float]]:
        """The snapshots that are read, and their coefficients: 0 for the nearest one, if it is not in the sum."""
        terms = [*zip(self.snapshots, self.fit.coefficients, strict=True)]
        return terms if self.nearest in self.snapshots else [*terms, (self.nearest, 0.0)]


def choose_snapshots(snapshots: Snapshots, target: Schedule | Window, *, step: int | None = None) -> Reconstruction:
    """Find the weighted sum of averages that comes closest to ``target`` at a step, the last one by default.

    A window is taken from a uniform track if there is one: from the two checkpoints nearest to its ends, or from one if
    it reaches back to the beginning. For a window over a Uniform track, snapshots after `step` may also be used.
    Everything else is a least-squares fit to the snapshots up to the step.

    Raises: CheckpointError for a step outside of those stored, and when there are too few snapshots; ValueError for a
        target without an exact profile, or a window that is longer than the time since averaging began.
    """
    step = snapshots.snapshots[-1].step if step is None else step
    time = snapshots.time_of(step)
    target_profile = profile_of(target, time)
    uniform = [snapshot for snapshot in snapshots.snapshots if _is_uniform(snapshot.profile)]
    if isinstance(target_profile, WindowProfile) and uniform:
        return _difference_of_means(uniform, target_profile, step)
    candidates = [snapshot for snapshot in snapshots.snapshots if snapshot.step <= step]
    fit = fit_profiles([snapshot.profile for snapshot in candidates], target_profile)
    nearest = _nearest(candidates, fit.coefficients, step)
    chosen = _without_negligible(candidates, fit.coefficients)
    fit = fit_profiles([snapshot.profile for snapshot in chosen], target_profile)
    return Reconstruction(chosen, fit, nearest, step, time)


def _difference_of_means(uniform: Sequence[Snapshot], target_profile: WindowProfile, step: int) -> Reconstruction:
    """The mean over ``(a, b]`` is ``(b * mean_b - a * mean_a) / (b - a)``, whose means begin at time 0.

    Source: icefall's ``average_checkpoints_with_averaged_model``.
    """
    last = min(uniform, key=lambda snapshot: abs(snapshot.profile.end - target_profile.end))
    earlier = [snapshot for snapshot in uniform if snapshot.profile.end < last.profile.end]
    first = min(earlier, key=lambda snapshot: abs(snapshot.profile.end - target_profile.begin), default=None)
    if first is None or target_profile.begin <= abs(first.profile.end - target_profile.begin):
        chosen, coefficients, begin = [last], [1.0], 0.0
    else:
        begin, end = first.profile.end, last.profile.end
        chosen, coefficients = [first, last], [-begin / (end - begin), end / (end - begin)]
    fit = evaluate_coefficients([snapshot.profile for snapshot in chosen], coefficients, target_profile)
    return Reconstruction(chosen, fit, last, step, target_profile.end, window=(begin, last.profile.end))


def _is_uniform(profile: Profile) -> bool:
    return isinstance(profile, PowerProfile) and profile.gamma == 0


def _nearest(candidates: Sequence[Snapshot], coefficients: Sequence[float], step: int) -> Snapshot:
    """The snapshot nearest to a step; among several tracks, the one with the largest absolute coefficient."""
    weighed = zip(candidates, coefficients, strict=True)
    return min(weighed, key=lambda pair: (abs(pair[0].step - step), -abs(pair[1])))[0]


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
    file_format: OutputFormat = "safetensors",
    max_shard_size: int | str = "5GiB",
    entry: str | None = None,
    timeout: float = 60.0,
) -> Fit:
    """Write the average that ``target`` would have given, as a weighted sum of the averages in a root of checkpoints.

    Snapshots may have been saved by different numbers of ranks and from different layouts. Tensors without an average,
    and buffers, are those of the snapshot nearest to ``step``.

    Args:
        root: a folder of checkpoints, each with averages by `Power`, `Uniform`, `HalfLife` without a ramp, or a number
            taken once in each unit of the clock; saved by `checkpoint.save` or ``dcp.save``.
        folder: must not exist.
        target: one of these laws, or `posthoc.Window`, in the unit of the clock since averaging began.
        step: the step at whose time the average is taken; by default the last one. For a window over a Uniform track,
            snapshots after `step` may also be used.
        tolerance: the maximum total variation between the target weights of past values and the weights obtained.
        dtype: of floating-point tensors; None for that of the live weights, or of the averages where these are missing.
        file_format: ``"safetensors"``, ``"torch"``, or ``"dcp"``, which `checkpoint.load` takes under ``model``.
        max_shard_size: bytes of tensors in a file, as a number or like ``"5GiB"``; a larger tensor gets its own file.
        entry: dotted name of the averages, if the checkpoints hold several.
        timeout: seconds that ranks wait for each other at the start.

    Returns: the coefficients of the snapshots that were used, the total variation, and the amplification of rounding.

    Collective: over all ranks, if there is a process group; all ranks must pass the same arguments. They share the
        tensors, and the files whose checksums are verified.
    Memory: the sum of one batch (16 MiB, or one larger tensor) and that batch from one snapshot; with ``"torch"``, also
        one output file.
    Raises: CheckpointError when snapshots are damaged, too few, of different models, or end before ``step``, when no
        combination is within the tolerance, and when ``folder`` exists; ValueError for a target without an exact
        profile. Nothing is written then.
    """
    snapshots = open_snapshots(Path(root), entry=entry)
    reconstruction = choose_snapshots(snapshots, target, step=step)
    require_within_tolerance(reconstruction, snapshots, tolerance=tolerance)
    notes = snapshots.notes + caveats(reconstruction, file_format, entry=entry)
    for note in notes if not dist.is_initialized() or dist.get_rank() == 0 else ():
        _log.info(note)
    write_reconstruction(
        reconstruction,
        weighted_sum(reconstruction, entry=entry, dtype=dtype),
        Path(folder),
        file_format=file_format,
        max_shard_size=max_shard_size,
        notes=notes,
        timeout=timeout,
    )
    return reconstruction.fit


def open_snapshots(root: Path, *, entry: str | None = None) -> Snapshots:
    """The averages in every step of a root, or in one checkpoint. Raises: as `read_snapshots`."""
    if checkpoints := checkpoints_by_step(root):
        return read_snapshots(checkpoints, entry=entry)
    folder = find_checkpoint(root)
    return read_snapshots([(step_in_name(folder) or 0, folder)], entry=entry)


def require_within_tolerance(reconstruction: Reconstruction, snapshots: Snapshots, *, tolerance: float) -> None:
    """Raises: CheckpointError when the total variation is above ``tolerance``."""
    fit = reconstruction.fit
    if fit.total_variation > tolerance:
        steps = sorted({snapshot.step for snapshot in snapshots.snapshots})
        nearest = sorted(sorted(steps, key=lambda stored: abs(stored - reconstruction.step))[:5])
        raise CheckpointError(
            f"the best fit has total variation {fit.total_variation:.3f}, above the tolerance of {tolerance:g}; the "
            f"stored steps nearest to {reconstruction.step} are {abbreviated(map(str, nearest))}. Save more snapshots, "
            "choose a wider profile, or raise `tolerance` (--force on the command line)"
        )


def write_reconstruction(
    reconstruction: Reconstruction,
    weights: WeightedSum,
    folder: Path,
    *,
    file_format: OutputFormat = "safetensors",
    max_shard_size: int | str = "5GiB",
    notes: Sequence[str] = (),
    on_bytes: Callable[[int], object] = lambda _: None,
    timeout: float = 60.0,
) -> list[Path]:
    """Write the `weighted_sum` of the snapshots, and ``reconstruct.json`` with their paths, tracks and coefficients.

    Raises: CheckpointError when a snapshot is damaged or of another model, or when the folder exists or cannot be
        written. Memory and Collective: as `write_weighted_sum`.
    """
    record = {"tracks": [it.track for it, _ in reconstruction.terms], **describe(reconstruction), "notes": [*notes]}
    return write_weighted_sum(
        weights,
        folder,
        call="checkpoint.reconstruct",
        verified=_checkpoints(reconstruction),
        file_format=file_format,
        max_shard_size=max_shard_size,
        record=record,
        record_name="reconstruct.json",
        on_bytes=on_bytes,
        timeout=timeout,
    )


def weighted_sum(
    reconstruction: Reconstruction, *, entry: str | None = None, dtype: torch.dtype | None = None
) -> WeightedSum:
    """The sum that a reconstruction describes. Raises: CheckpointError when snapshots are of different models."""
    snapshots = [snapshot for snapshot, _ in reconstruction.terms]
    nearest = snapshots.index(reconstruction.nearest)
    selections = [it.stored.weights("ema", track=it.track, entry=entry) for it in snapshots]
    base = selections[nearest]
    terms = [
        Term(CheckpointSource(snapshot.stored, _with_names_of(base, selection, snapshot)), coefficient)
        for (snapshot, coefficient), selection in zip(reconstruction.terms, selections, strict=True)
    ]
    averaged = {*reconstruction.nearest.averages.tracks[reconstruction.nearest.track].averages.values()}
    copied = {name for name, (dcp_name, _) in base.sources.items() if dcp_name not in averaged}
    return WeightedSum(terms, base=nearest, copied=copied, dtype=dtype)


def _with_names_of(base: WeightSelection, selection: WeightSelection, snapshot: Snapshot) -> WeightSelection:
    """The averages in ``selection``, also under the second names of tied tensors if ``base`` has them.

    A checkpoint without the live model stores an average under its first name only, and no weights without an average.
    """
    if selection is base:
        return selection
    averaged = {*snapshot.averages.tracks[snapshot.track].averages.values()}
    sources = {
        name: source for name, source in selection.sources.items() if name in base.sources or source[0] in averaged
    }
    ties = {name: first for name, first in selection.ties.items() if name in sources}
    for name, first in base.ties.items():
        if name not in sources and first in sources:
            sources[name], ties[name] = sources[first], first
    # Second names that the base lacks, because it has no live model.
    extra = {name for name, first in ties.items() if name not in base.sources and first in base.sources}
    return replace(
        selection,
        sources={name: source for name, source in sources.items() if name not in extra},
        ties={name: first for name, first in ties.items() if name not in extra},
    )


def _checkpoints(reconstruction: Reconstruction) -> list[StoredCheckpoint]:
    """The checkpoints that are read, without duplicates."""
    return [*{id(snapshot.stored): snapshot.stored for snapshot, _ in reconstruction.terms}.values()]


def caveats(reconstruction: Reconstruction, file_format: str, *, entry: str | None = None) -> list[str]:
    """Warnings about the written tensors, from the snapshot that supplies their names."""
    nearest = reconstruction.nearest
    source = CheckpointSource(nearest.stored, nearest.stored.weights("ema", track=nearest.track, entry=entry))
    # The share of the starting weights in this snapshot is not that in the sum.
    notes = [it for it in source.caveats if it != nearest.averages.describe_initial_weights(nearest.track)]
    return notes + left_out_note(source.extra_states, file_format)


def input_nbytes(reconstruction: Reconstruction, weights: WeightedSum) -> int:
    """The bytes that `write_reconstruction` reads: the files for their checksums, and the tensors."""
    manifests = [stored.manifest for stored in _checkpoints(reconstruction) if stored.manifest]
    files = [record.size for manifest in manifests for record in manifest.files.values()]
    return sum(files) + weights.input_nbytes


def describe(reconstruction: Reconstruction) -> dict[str, Any]:
    """The target of a reconstruction and the quality of its fit, as JSON."""
    return {
        "step": reconstruction.step,
        "time": reconstruction.time,
        "window": reconstruction.window,
        "total_variation": reconstruction.fit.total_variation,
        "amplification": reconstruction.fit.amplification,
    }
