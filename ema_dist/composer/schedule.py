"""When averages are updated, and with which decay: parses and checks Composer's time strings."""

from __future__ import annotations

from dataclasses import dataclass

from composer.core import Event, State, Time, TimeUnit

from ema_dist.schedules.equations import decay_from_half_life

UPDATE_EVENTS = {TimeUnit.BATCH: Event.BATCH_END, TimeUnit.EPOCH: Event.EPOCH_END}
START_UNITS = (TimeUnit.DURATION, TimeUnit.BATCH, TimeUnit.EPOCH)


class DefaultHalfLife(str):
    """The default half-life: equal to the same string, but its type shows that the user gave no half-life."""

    __slots__ = ()


@dataclass(frozen=True)
class UpdateSchedule:
    """When averages are updated, and how much of the old average each update keeps.

    Args:
        smoothing: the factor of the old average at each update (`ShardedEMA` calls it decay).
    """

    half_life: Time | None
    smoothing: float
    start: Time
    interval: Time

    @classmethod
    def parse(
        cls, half_life: str | None, smoothing: float | None, ema_start: str, update_interval: str | None
    ) -> UpdateSchedule:
        """Make the schedule from Composer's arguments.

        Raises: ValueError where Composer raises an error, and for mistakes that it does not notice.
        """
        if isinstance(half_life, DefaultHalfLife) and smoothing is not None:
            half_life = None
        if half_life is None and smoothing is None:
            raise ValueError("Either half_life or smoothing must be specified")
        if half_life is not None and smoothing is not None:
            raise ValueError("Only one of half_life or smoothing can be specified")
        if update_interval is not None and not isinstance(update_interval, str):
            raise ValueError(f"update_interval must be None or a time string, got {update_interval!r}")
        parsed_half_life = None if half_life is None else _parse_time("half_life", half_life)
        interval = _parse_interval(update_interval, parsed_half_life)
        if smoothing is None:
            assert parsed_half_life is not None
            smoothing = decay_from_half_life(parsed_half_life.value, interval.value)
        if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing is the factor of the old average, a number in [0, 1], got {smoothing!r}")
        start = _parse_time("ema_start", ema_start)
        if start.unit not in START_UNITS:
            raise ValueError(f"Invalid time unit for parameter ema_start: {start.unit}; expected 'dur', 'ba' or 'ep'")
        return cls(parsed_half_life, float(smoothing), start, interval)

    @property
    def update_event(self) -> Event:
        """The event at which the averages are updated, if an update is due."""
        return UPDATE_EVENTS[self.interval.unit]

    def has_started(self, state: State) -> bool:
        """Whether the training has reached the start of the averages."""
        if self.start.unit == TimeUnit.DURATION:
            elapsed = state.get_elapsed_duration()
            return elapsed is not None and self.start <= elapsed
        return self.start <= state.timestamp.get(self.start.unit)

    def is_mid_interval(self, state: State) -> bool:
        """Whether batches have been trained since an update was last due."""
        if self.interval.unit == TimeUnit.EPOCH and state.timestamp.batch_in_epoch > 0:
            return True
        return not self.is_due(state)

    def is_due(self, state: State) -> bool:
        """Whether the averages are updated at this event."""
        return state.timestamp.get(self.interval.unit).value % self.interval.value == 0


def _parse_interval(update_interval: str | None, half_life: Time | None) -> Time:
    if update_interval is None:
        interval = Time(1, half_life.unit if half_life else TimeUnit.BATCH)
    else:
        interval = _parse_time("update_interval", update_interval)
    if interval.unit not in UPDATE_EVENTS:
        name = "update_interval" if update_interval else "half_life"
        raise ValueError(f"Invalid time unit for parameter {name}: {interval.unit}; expected 'ba' or 'ep'")
    if half_life is not None and half_life.unit != interval.unit:
        raise ValueError(f"Units of half_life and update_interval must match, got {half_life} and {interval}.")
    if interval.value < 1:
        raise ValueError(f"update_interval must be at least 1, got {update_interval!r}")
    return interval


def _parse_time(name: str, text: str) -> Time:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a time string such as '10ba', got {text!r}")
    try:
        time = Time.from_timestring(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must be a time string such as '10ba', got {text!r}: {error}") from None
    if time.value < 0:
        raise ValueError(f"{name} must not be negative, got {text!r}")
    return time
