"""Chooses the snapshots and coefficients that make a profile, and says how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.snapshots import Snapshot, Snapshots
from ema_dist.messages import abbreviated
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
