"""The decay of an exponential moving average: as equations, then as the settings a user gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_TRACK = "default"
"""The name of the only track of a model with one decay."""


def decay_from_half_life(half_life: float, steps: float = 1) -> float:
    """The decay over ``steps`` steps for which ``half_life`` steps leave half of the old average.

    Source: Composer's EMA, ``smoothing = exp(-log(2) / half_life)``, here ``2 ** (-steps / half_life)``.
    """
    if half_life == 0:
        return 0.0
    return 2.0 ** (-steps / half_life)


def half_life_from_decay(decay: float) -> float:
    """The number of updates with this decay that leave half of the old average."""
    if decay in {0.0, 1.0}:
        return math.inf if decay else 0.0
    return -1 / math.log2(decay)


@dataclass(frozen=True)
class HalfLife:
    """Decay by half-life: after ``steps`` optimizer steps, half of the old average is left.

    It does not depend on how often the average is taken. ``HalfLife(0)`` means no averaging (the average is the last
    live value), ``HalfLife(math.inf)`` means no update (the average is the first live value).

    Raises: ValueError for a negative number or NaN.
    """

    steps: float

    def __post_init__(self) -> None:
        if not self.steps >= 0:
            raise ValueError(f"a half-life is 0 or more optimizer steps, got {self.steps!r}")

    def decay(self, interval: int) -> float:
        """The factor of the old average when one is taken every ``interval`` steps."""
        return decay_from_half_life(self.steps, interval)

    def state(self) -> dict[str, str | float]:
        """The form that a checkpoint records."""
        return {"kind": "half_life", "value": float(self.steps)}


@dataclass(frozen=True)
class Constant:
    """The same factor of the old average at every update, whatever the number of steps between updates.

    Raises: ValueError outside [0, 1].
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise ValueError(
                f"a decay lies in [0, 1], got {self.value!r}; for a half-life in steps use HalfLife(steps)"
            )

    def decay(self, interval: int) -> float:  # noqa: ARG002 - the same signature as HalfLife
        """The factor of the old average, whatever the interval."""
        return self.value

    def state(self) -> dict[str, str | float]:
        """The form that a checkpoint records."""
        return {"kind": "constant", "value": float(self.value)}


Decay = HalfLife | Constant


def as_decay(decay: HalfLife | float) -> Decay:
    """The decay that a user's ``decay`` argument stands for.

    Raises: TypeError for anything but a HalfLife or a number, ValueError for a number outside [0, 1].
    """
    if isinstance(decay, HalfLife | Constant):
        return decay
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        raise TypeError(f"decay is a number in [0, 1] or HalfLife(steps), got {decay!r}")
    return Constant(float(decay))


def as_decays(decay: HalfLife | float | Mapping[str, HalfLife | float]) -> dict[str, Decay]:
    """The decays that a user's ``decay`` argument stands for, by track: `DEFAULT_TRACK` for a single one.

    Raises: as `as_decay`; ValueError for no track, or for a track name that is empty or contains a dot.
    """
    if not isinstance(decay, Mapping):
        return {DEFAULT_TRACK: as_decay(decay)}
    if not decay or not all(isinstance(name, str) and name and "." not in name for name in decay):
        raise ValueError(f"expected decays by the names of their tracks, texts without dots, got {dict(decay)!r}")
    return {name: as_decay(value) for name, value in decay.items()}
