"""The averages in a series of checkpoints, with the profile of each, which follows from its time and its law."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median

from ema_dist.checkpoint.dcp.checkpoint_index import dotted_name
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.stored_checkpoint import StoredAverages, StoredCheckpoint
from ema_dist.messages import abbreviated
from ema_dist.posthoc.profiles import Profile, profile_of
from ema_dist.schedules.laws import Constant

MIN_CLOCK_RATE = 0.9
"""A gradient scaler may skip steps, so the clock may run this much slower than the step numbers. Below it, warn about a
possible `reset`."""

MASS_TOLERANCE = 1e-6
"""The recorded share of the starting weights may differ from the share under the law only by rounding."""


@dataclass(frozen=True)
class Snapshot:
    """One track of one checkpoint."""

    step: int
    """The step of the checkpoint."""
    track: str
    averages: StoredAverages
    stored: StoredCheckpoint
    profile: Profile
    """The weight that the average gives to each past value."""

    @property
    def law(self) -> str:
        """The law of the track, as a user writes it."""
        return self.averages.decays[self.track].record.describe()


@dataclass
class Snapshots:
    """The averages in a series of checkpoints whose profiles are known, oldest first."""

    snapshots: list[Snapshot]
    notes: list[str] = field(default_factory=list)
    """Which averages are ignored, and why."""

    def time_of(self, step: int) -> float:
        """The time since averaging began at a step, interpolated linearly between two checkpoints.

        Raises: CheckpointError for a step before the first or after the last checkpoint.
        """
        times = {snapshot.step: snapshot.profile.end for snapshot in self.snapshots}
        if not min(times) <= step <= max(times):
            raise CheckpointError(
                f"expected a step between {min(times)} and {max(times)}, the first and last snapshots, got {step}; "
                f"stored steps: {abbreviated(map(str, times))}"
            )
        before = max(stored for stored in times if stored <= step)
        after = min(stored for stored in times if stored >= step)
        share = (step - before) / (after - before) if after > before else 0.0
        return times[before] + share * (times[after] - times[before])


def read_snapshots(checkpoints: Iterable[tuple[int, Path]], *, entry: str | None = None) -> Snapshots:
    """The averages in these checkpoints whose profiles are known.

    Checkpoints from before averaging last restarted (by `reset`, or before `start`) are ignored, and so are tracks
    without an exact law.

    Args:
        checkpoints: the step and folder of each.
        entry: dotted name of the averages, if checkpoints hold several.

    Raises: CheckpointError when a checkpoint is damaged or holds no averages, or when nothing is left.
    """
    series = [StoredStep(step, *_open(folder, entry)) for step, folder in sorted(checkpoints)]
    notes: list[str] = []
    of_one_averaging = _since_last_restart(series, notes)
    tracks = dict.fromkeys(track for stored in of_one_averaging for track in stored.averages.tracks)
    found = [
        snapshot
        for track in tracks
        for snapshot in _of_track(track, [it for it in of_one_averaging if track in it.averages.tracks], notes)
    ]
    if not found:
        raise CheckpointError("no averages to combine: " + "; ".join(notes))
    return Snapshots(sorted(found, key=lambda snapshot: snapshot.step), notes)


def _open(folder: Path, entry: str | None) -> tuple[StoredCheckpoint, StoredAverages]:
    stored = StoredCheckpoint(folder)
    by_name = {dotted_name(key_path): averages for key_path, averages in stored.averages.items()}
    chosen = by_name if entry is None else {name: it for name, it in by_name.items() if name == entry}
    if not chosen:
        in_entry = "" if entry is None else f" in an entry {entry!r}"
        raise CheckpointError(f"expected averages{in_entry} in {folder}, found {[*by_name] or 'none'}")
    if len(chosen) > 1:
        raise CheckpointError(
            f"{folder} holds several averages, {[*by_name]}: choose one by `entry` (--entry on the command line)"
        )
    return stored, next(iter(chosen.values()))


@dataclass(frozen=True)
class StoredStep:
    """The averages of one step in a series of checkpoints."""

    step: int
    checkpoint: StoredCheckpoint
    averages: StoredAverages


def _since_last_restart(series: Sequence[StoredStep], notes: list[str]) -> list[StoredStep]:
    """The checkpoints since averaging last restarted, after its first update."""
    newest = series[-1].averages.clock
    kept: list[StoredStep] = []
    left_out: list[str] = []
    later, is_earlier_averaging = inf, False
    for stored in reversed(series):
        step, clock = stored.step, stored.averages.clock
        if not clock.updates or clock.last_update == clock.start_time:
            left_out.append(f"step {step} is ignored: no update had been made yet")
            continue
        has_other_start = (clock.start_step, clock.start_time) != (newest.start_step, newest.start_time)
        is_earlier_averaging |= has_other_start or clock.last_update >= later
        if is_earlier_averaging:
            left_out.append(
                f"step {step} is ignored: averaging restarted after it (clock {clock.start_time:g} to "
                f"{clock.last_update:g} there, {newest.start_time:g} to {newest.last_update:g} at step "
                f"{series[-1].step})"
            )
            continue
        kept.append(stored)
        later = clock.last_update
    notes += reversed(left_out)
    kept.reverse()
    if suspects := _slow_clock_intervals(kept):
        notes.append(
            f"between steps {suspects} the clock advanced less than the checkpoint steps. If reset() was called there, "
            "move the earlier checkpoints to another folder and run again"
        )
    return kept


def _slow_clock_intervals(series: Sequence[StoredStep]) -> str:
    """The steps between which the clock was slower than usual, perhaps because of a reset, which it does not record."""
    pairs = [(a.step, b.step, (b.averages.steps - a.averages.steps) / (b.step - a.step)) for a, b in pairwise(series)]
    usual = median(speed for _, _, speed in pairs) if pairs else 0.0
    return abbreviated(f"{first} and {last}" for first, last, speed in pairs if speed < MIN_CLOCK_RATE * usual)


def _of_track(track: str, series: Sequence[StoredStep], notes: list[str]) -> Iterator[Snapshot]:
    """The snapshots of one track, up to the first whose law differs from that of the first snapshot."""
    first_record = series[0].averages.decays[track].record
    for stored in series:
        step, averages = stored.step, stored.averages
        record = averages.decays[track].record
        if not record.is_same_law(first_record):
            notes.append(
                f"track {track!r} is ignored from step {step} on: its law was {record.describe()} then, and "
                f"{first_record.describe()} at step {series[0].step}"
            )
            return
        if isinstance(profile := _profile(averages, track), str):
            notes.append(f"track {track!r} of step {step} is ignored: {profile}")
        else:
            yield Snapshot(step, track, averages, stored.checkpoint, profile)


def _profile(averages: StoredAverages, track: str) -> Profile | str:
    """The profile of a stored average, or why it is not known."""
    clock, record = averages.clock, averages.decays[track].record
    time = float(clock.last_update - clock.start_time)
    law = record.make_law()
    if law is None:
        return f"{record.describe()} is not an ema_dist law, so its profile is unknown"
    if isinstance(law, Constant) and clock.updates != time:
        return (
            f"{law!r} was applied {clock.updates} times in {time:g} clock units: a constant decay has a known profile "
            "only if applied once per unit"
        )
    try:
        profile = profile_of(law, time)
    except ValueError as error:
        return str(error)
    mass = clock.initial_masses[track]
    if abs(mass - profile.initial_mass) > MASS_TOLERANCE:
        return (
            f"the initial weights make up {mass:.3g} of this average, but {law!r} implies {profile.initial_mass:.3g}: "
            "the law or the clock changed during the run"
        )
    return profile
