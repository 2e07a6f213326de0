"""The ``decay`` argument that users pass, and the ``decay`` entry of each track in a state.

The entry is ``{"kind": str, "value": str}``: the name of the law, and a JSON text with its fields and the clock.
Earlier versions stored a number as the value. In both cases there is one non-tensor leaf called ``decay.value``,
because plain ``dcp.load`` requests leaves by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ema_dist.schedules.clock import Clock, ClockState
from ema_dist.schedules.laws import (
    Constant,
    Cosine,
    ExponentialWarmup,
    HalfLife,
    InverseGamma,
    Power,
    Uniform,
    Warmup,
)
from ema_dist.schedules.schedule import Schedule, describe, fields_of

DEFAULT_TRACK = "default"
"""The name of the only track of a model with one decay."""

LAWS: dict[str, type[Schedule]] = {
    "half_life": HalfLife,
    "constant": Constant,
    "power": Power,
    "uniform": Uniform,
    "inverse_gamma": InverseGamma,
    "warmup": Warmup,
    "exponential_warmup": ExponentialWarmup,
    "cosine": Cosine,
}
"""The laws of this package by the kind that states record; the kind of a user-defined law is the name of its class."""

UNRECORDED = "unrecorded"
"""The kind of the law of imported averages whose file does not record it."""

_KINDS = {law: kind for kind, law in LAWS.items()}
_TIMES = ("steps", "time", "start_step", "start_time", "last_update")
_MISSED_WRITES = "has_missed_writes"
"""Recorded only if it is true; earlier versions ignore it."""


def as_schedule(decay: Schedule | float) -> Schedule:
    """The law that a user's ``decay`` argument stands for.

    Raises: TypeError for anything but a law or a number, ValueError for a number outside [0, 1].
    """
    if isinstance(decay, type):
        raise TypeError(f"decay must be a law or a number in [0, 1], got {decay!r}; did you mean {decay.__name__}()?")
    if isinstance(decay, Schedule) and callable(decay.decay):
        return decay
    return Constant(decay)  # pyrefly: ignore[bad-argument-type]  it checks that this is a number


def as_schedules(decay: Schedule | float | Mapping[str, Schedule | float]) -> dict[str, Schedule]:
    """The laws that a user's ``decay`` argument stands for, by track: `DEFAULT_TRACK` for a single one.

    Raises: as `as_schedule`; ValueError for an empty mapping, or a track name that is empty or contains a dot.
    """
    if not isinstance(decay, Mapping):
        return {DEFAULT_TRACK: as_schedule(decay)}
    if not decay or not all(isinstance(name, str) and name and "." not in name for name in decay):
        raise ValueError(
            f"decay must map track names (non-empty strings without dots) to schedules or numbers, got {dict(decay)!r}"
        )
    return {name: as_schedule(value) for name, value in decay.items()}


@dataclass(frozen=True)
class DecayRecord:
    """The ``decay`` entry of one track.

    Args:
        kind: a key of `LAWS`, or the class name of a user-defined law.
        fields: the fields of the law.
        clock: the fields of `ClockState` for this track; empty in states that recorded no clock.
    """

    kind: str
    fields: Mapping[str, Any]
    clock: Mapping[str, float]

    @classmethod
    def of_law(cls, law: Schedule) -> DecayRecord:
        """The record of a law, without a clock."""
        return cls(_KINDS.get(type(law), type(law).__qualname__), fields_of(law), {})

    @classmethod
    def parse(cls, kind: object, value: object) -> DecayRecord:
        """The record of the ``decay`` entry of a state.

        Raises: ValueError if the entry is damaged. An unknown law or unknown fields are accepted here.
        """
        if not isinstance(kind, str):
            raise ValueError(f"decay.kind must be a string, got {kind!r}")
        if isinstance(value, int | float) and kind in ("half_life", "constant"):
            record = cls(kind, {"value": value}, {})
            record.make_law()  # checks the number
            return record
        if not isinstance(value, str):
            raise ValueError(
                f"decay.value of {kind!r} must be a JSON text (or a number, for half_life and constant); got {value!r}"
            )
        try:
            fields, clock = (json.loads(value)[key] for key in ("law", "clock"))
            return cls(kind, dict(fields), _checked_clock(clock))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"decay.value of {kind!r} is damaged: {error}; got {value!r}") from None

    def make_law(self) -> Schedule | None:
        """The law itself; None for a user-defined one.

        Raises: ValueError when its fields are unknown or out of range.
        """
        if self.kind not in LAWS:
            return None
        fields = dict(self.fields)
        positional = [fields.pop("value")] if "value" in fields else []
        try:
            return LAWS[self.kind](*positional, **fields)
        except TypeError as error:
            raise ValueError(
                f"this version of ema_dist cannot construct {self.describe_fields()}: {error}; a newer version may "
                "have saved it"
            ) from None

    def describe(self) -> str:
        """The call that constructs the law, if it is recorded."""
        if self.kind == UNRECORDED:
            return "law not recorded"
        try:
            law = self.make_law()
        except ValueError:
            law = None
        return self.describe_fields() if law is None else repr(law)

    def describe_fields(self) -> str:
        """As `describe`, but from the fields alone, so that it works for a law that this version does not know."""
        return describe(LAWS[self.kind].__name__ if self.kind in LAWS else self.kind, self.fields)

    def is_same_law(self, other: DecayRecord) -> bool:
        """Whether both record the same law with equal fields."""
        mine, others = ({name: value for name, value in r.fields.items() if value is not None} for r in (self, other))
        return (self.kind, mine) == (other.kind, others)

    def state(self) -> dict[str, str]:
        """The entry to save."""
        return {"kind": self.kind, "value": json.dumps({"law": dict(self.fields), "clock": dict(self.clock)})}


def record_decays(clock: Clock) -> dict[str, DecayRecord]:
    """The records of a state, by track. Waits for the device if some steps were counted there."""
    state = clock.read_on_host()
    times = {name: getattr(state, name) for name in _TIMES}
    records: dict[str, DecayRecord] = {}
    for track, schedule in clock.schedules.items():
        shown = times | {"initial_mass": state.initial_masses[track], "last_decay": state.last_decays[track]}
        shown |= {_MISSED_WRITES: 1} if state.has_missed_writes else {}
        law = DecayRecord.of_law(schedule)
        records[track] = DecayRecord(law.kind, law.fields, shown)
    return records


def require_default_track(decay: object) -> None:
    """Raises: ValueError for several tracks of which none has the name that calls without a track use."""
    if isinstance(decay, Mapping) and len(decay) > 1 and DEFAULT_TRACK not in decay:
        raise ValueError(
            f"decay: expected one of several tracks to be called {DEFAULT_TRACK!r}, which evaluations use, got "
            f"{[*decay]}"
        )


def record_counts(law: Schedule | None, *, steps: int, start: int, has_average: bool) -> DecayRecord:
    """The record of averages by another package, with the clock that follows from its counts.

    Args:
        law: one whose first update copies the live weights, at each step; None if it is unknown.
        start: the number of steps that only copy the live weights, if there have been so many.
        has_average: whether there has been an update. Then nothing of the initial weights counts as left.
    """
    start_step = min(start, steps)
    times = (steps, float(steps), start_step, float(start_step), float(steps))
    clock = dict(zip(_TIMES, times, strict=True))
    clock |= {"initial_mass": 0.0 if has_average else 1.0, "last_decay": 0.0}
    if law is None:
        return DecayRecord(UNRECORDED, {}, clock)
    if since_start := float(steps - start_step):
        clock["last_decay"] = float(law.decay(time=since_start, elapsed=1.0, step=since_start - 1))
    return replace(DecayRecord.of_law(law), clock=clock)


def describe_changed_laws(records: Mapping[str, DecayRecord], schedules: Mapping[str, Schedule]) -> str:
    """The laws that differ, as ``saved -> current``; with the names of their tracks if there are several."""
    changed: list[str] = []
    for track, schedule in schedules.items():
        saved, current = records[track], DecayRecord.of_law(schedule)
        if saved.kind != UNRECORDED and not saved.is_same_law(current):
            prefix = f"{track}: " if len(schedules) > 1 else ""
            changed.append(f"{prefix}{saved.describe()} -> {current.describe()}")
    return ", ".join(changed)


def read_clock(records: Mapping[str, DecayRecord], *, steps: int, updates: int, start: float = 0) -> ClockState:
    """The clock saved in a state.

    Args:
        start: `Clock.start`, up to which the steps of imported averages count as steps before averaging if their file
            records no law: then it records no start either.

    If the state has no clock, or its ``steps`` no longer matches the clock, assumes that averaging began at time 0 and
    the last update was at ``steps``. The initial mass is then computed from the counts for a half-life and a constant
    decay; for other laws it is assumed to be 1, which may be too large.

    Raises: ValueError when the clocks of tracks differ.
    """
    clocks = {track: _clock_of(record, steps, updates) for track, record in records.items()}
    times = {tuple(clock[name] for name in _TIMES) for clock in clocks.values()}
    if len(times) > 1:
        raise ValueError(
            f"all tracks of a state must have the same clock, got {clocks}: the checkpoint is damaged, load another one"
        )
    (_, time, start_step, start_time, last_update), *_ = times
    if any(record.kind == UNRECORDED for record in records.values()):
        start_step, start_time = int(min(start, steps)), min(start, time)
    masses = {track: clock["initial_mass"] for track, clock in clocks.items()}
    last_decays = {track: clock["last_decay"] for track, clock in clocks.items()}
    missed = any(_MISSED_WRITES in clock for clock in clocks.values())
    return ClockState(steps, updates, time, int(start_step), start_time, last_update, masses, last_decays, missed)


def _clock_of(record: DecayRecord, steps: int, updates: int) -> Mapping[str, float]:
    if record.clock and record.clock["steps"] == steps:
        return record.clock
    mass, last_decay = 1.0, 0.0
    if updates and isinstance(law := record.make_law(), HalfLife | Constant):
        last_decay = float(law.decay(time=steps, elapsed=steps / updates, step=steps - 1))
        mass = last_decay**updates
    times = (steps, float(steps), 0, 0.0, float(steps))
    return {**dict(zip(_TIMES, times, strict=True)), "initial_mass": mass, "last_decay": last_decay}


def _checked_clock(clock: Mapping[str, Any]) -> dict[str, float]:
    checked = {name: float(clock[name]) for name in (*_TIMES, "initial_mass", "last_decay")}
    steps, time, start_step, start_time, last_update, mass, last_decay = checked.values()
    is_sound = 0 <= start_step <= steps < math.inf and 0 <= start_time <= last_update <= time < math.inf
    if not is_sound or not 0 <= mass <= 1 or not 0 <= last_decay <= 1:
        raise ValueError(
            "clock values must satisfy start_step <= steps and start_time <= last_update <= time, and shares must be "
            f"in [0, 1]; got {clock}"
        )
    return checked | ({_MISSED_WRITES: 1.0} if clock.get(_MISSED_WRITES) else {})
