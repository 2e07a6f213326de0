"""The averages in a series of checkpoints, each with the time and the law that its profile follows from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

USUAL_SPEED = 0.9
"""Steps that a gradient scaler skipped do not count: the clock may be so much slower than the names of steps."""

MASS_TOLERANCE = 1e-6
"""The recorded share of the starting weights may differ from that of the law by rounding only."""


@dataclass(frozen=True)
class Snapshot:
    """One track of one checkpoint."""

    step: int
    """The step of the checkpoint."""
    track: str
    averages: StoredAverages
    stored: StoredCheckpoint
    profile: Profile
    """Which weight it gives to each past value."""

    @property
    def law(self) -> str:
        """The law of the track, as a user writes it."""
        return self.averages.decays[self.track].record.describe()


@dataclass
class Snapshots:
    """The averages in a series of checkpoints whose profiles are known, oldest first."""

    found: list[Snapshot]
    notes: list[str] = field(default_factory=list)
    """Which averages are left out, and why."""

    def time_of(self, step: int) -> float:
        """The time since averaging began at a step; between two checkpoints, in proportion.

        Raises: CheckpointError for a step before the first or after the last checkpoint.
        """
        times = {snapshot.step: snapshot.profile.end for snapshot in self.found}
        if not min(times) <= step <= max(times):
            raise CheckpointError(
                f"step {step} is not within the steps of the snapshots, {min(times)} to {max(times)}: choose one of "
                f"these, {abbreviated(map(str, times))}"
            )
        before = max(stored for stored in times if stored <= step)
        after = min(stored for stored in times if stored >= step)
        share = (step - before) / (after - before) if after > before else 0.0
        return times[before] + share * (times[after] - times[before])


def read_snapshots(checkpoints: Iterable[tuple[int, Path]], *, entry: str | None = None) -> Snapshots:
    """The averages in these checkpoints, as far as their profiles are known.

    They belong to one averaging: checkpoints that saw it begin at another time, before `start` or a `reset`, are left
    out, and so are tracks without an exact law.

    Args:
        checkpoints: the step and folder of each.
        entry: dotted name of the averages, if checkpoints hold several.

    Raises: CheckpointError when a checkpoint is damaged or holds no averages, or when nothing is left.
    """
    series = [(step, *_open(folder, entry)) for step, folder in sorted(checkpoints)]
    notes: list[str] = []
    of_one_averaging = _with_one_beginning(series, notes)
    tracks = dict.fromkeys(track for _, _, averages in of_one_averaging for track in averages.tracks)
    found = [
        snapshot
        for track in tracks
        for snapshot in _of_track(track, [it for it in of_one_averaging if track in it[2].tracks], notes)
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


_Series = list[tuple[int, StoredCheckpoint, StoredAverages]]


def _with_one_beginning(series: _Series, notes: list[str]) -> _Series:
    """The checkpoints since averaging began for the last time, and has taken an average."""
    newest = series[-1][2].clock
    kept: _Series = []
    left_out: list[str] = []
    later, is_earlier_averaging = inf, False
    for step, stored, averages in reversed(series):
        clock = averages.clock
        if not clock.updates or clock.last_update == clock.start_time:
            left_out.append(f"step {step} is left out: no average was taken until then")
            continue
        has_other_start = (clock.start_step, clock.start_time) != (newest.start_step, newest.start_time)
        is_earlier_averaging |= has_other_start or clock.last_update >= later
        if is_earlier_averaging:
            left_out.append(
                f"step {step} is left out: averaging began anew after it (there from the time {clock.start_time:g} to "
                f"{clock.last_update:g}, at step {series[-1][0]} from {newest.start_time:g} to {newest.last_update:g})"
            )
            continue
        kept.append((step, stored, averages))
        later = clock.last_update
    notes += reversed(left_out)
    kept.reverse()
    if suspects := _missing_steps(kept):
        notes.append(
            f"the clock counted fewer steps than the names of the checkpoints do, between the steps {suspects}: if "
            "reset() was called there, move the older checkpoints away and reconstruct again"
        )
    return kept


def _missing_steps(series: _Series) -> str:
    """The checkpoints between which the clock went slower than usual; it cannot tell that it began anew."""
    pairs = [(a[0], b[0], (b[2].steps - a[2].steps) / (b[0] - a[0])) for a, b in pairwise(series)]
    usual = median(speed for _, _, speed in pairs) if pairs else 0.0
    return abbreviated(f"{first} and {last}" for first, last, speed in pairs if speed < USUAL_SPEED * usual)


def _of_track(track: str, series: _Series, notes: list[str]) -> Iterator[Snapshot]:
    """The snapshots of one track, up to the first that has another law than the one before it."""
    first_step, _, first = series[0]
    first_record = first.decays[track].record
    for step, stored, averages in series:
        record = averages.decays[track].record
        if not record.is_same_law(first_record):
            notes.append(
                f"track {track!r} is left out from step {step} on: it was averaged by {record.describe()} then, and by "
                f"{first_record.describe()} at step {first_step}"
            )
            return
        if isinstance(profile := _profile(averages, track), str):
            notes.append(f"track {track!r} of step {step} is left out: {profile}")
        else:
            yield Snapshot(step, track, averages, stored, profile)


def _profile(averages: StoredAverages, track: str) -> Profile | str:
    """The profile of a stored average, or why it is not known."""
    clock, record = averages.clock, averages.decays[track].record
    time = float(clock.last_update - clock.start_time)
    law = record.law
    if law is None:
        return f"{record.describe()} is no law of this package, and has no known profile"
    if isinstance(law, Constant) and clock.updates != time:
        return f"{law!r} was taken {clock.updates} times in {time:g} units of time, not once in each unit"
    try:
        profile = profile_of(law, time)
    except ValueError as error:
        return str(error)
    mass = clock.initial_masses[track]
    if abs(mass - profile.initial_mass) > MASS_TOLERANCE:
        return (
            f"{mass:.3g} of it are the weights at which averaging began, but {profile.initial_mass:.3g} by {law!r}: "
            "the law or the clock was replaced during the run"
        )
    return profile
