"""How much of the old average stays: the weights of an exponential moving average as equations, then as settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_TRACK = "default"
"""The name of the only track of averages with one decay."""


def decay_from_half_life(half_life: float, steps: float = 1) -> float:
    """Decay of ``steps`` steps at once, after which ``half_life`` steps leave half of the old average.

    Source: Composer's EMA, ``smoothing = exp(-log(2) / half_life)``, here ``2 ** (-steps / half_life)``.
    """
    if half_life == 0:
        return 0.0
    return 2.0 ** (-steps / half_life)


def half_life_from_decay(decay: float) -> float:
    """The number of updates, each with this decay, that leave half of the old average."""
    if decay in {0.0, 1.0}:
        return math.inf if decay else 0.0
    return -1 / math.log2(decay)


@dataclass(frozen=True)
class HalfLife:
    """Decay by half-life: after ``steps`` optimizer steps, half of what was in the average is left.

    It does not depend on how often the average is taken. ``HalfLife(0)`` means no averaging (the average is the last
    live value), ``HalfLife(math.inf)`` no update (it stays at the first).

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
        """What a checkpoint records of it."""
        return {"kind": "half_life", "value": float(self.steps)}


@dataclass(frozen=True)
class Constant:
    """The same factor of the old average at every update, however many steps lie between two.

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
        """What a checkpoint records of it."""
        return {"kind": "constant", "value": float(self.value)}


Decay = HalfLife | Constant


def as_decay(decay: HalfLife | float) -> Decay:
    """The setting that a user's ``decay`` argument names.

    Raises: TypeError for anything but a HalfLife or a number, ValueError for a number outside [0, 1].
    """
    if isinstance(decay, HalfLife | Constant):
        return decay
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        raise TypeError(f"decay is a number in [0, 1] or HalfLife(steps), got {decay!r}")
    return Constant(float(decay))


def as_decays(decay: HalfLife | float | Mapping[str, HalfLife | float]) -> dict[str, Decay]:
    """The settings that a user's ``decay`` argument names, by track: `DEFAULT_TRACK` for a single one.

    Raises: as `as_decay`; ValueError for no track, or a name that is empty or has a dot.
    """
    if not isinstance(decay, Mapping):
        return {DEFAULT_TRACK: as_decay(decay)}
    if not decay or not all(isinstance(name, str) and name and "." not in name for name in decay):
        raise ValueError(f"expected decays by the names of their tracks, texts without dots, got {dict(decay)!r}")
    return {name: as_decay(value) for name, value in decay.items()}
