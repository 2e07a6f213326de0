"""Checks of the numbers that users pass."""

from __future__ import annotations

import math
from numbers import Real


def checked_number(
    name: str,
    value: object,
    expected: str,
    *,
    lowest: float = 0,
    highest: float = math.inf,
    open_below: bool = False,
    open_above: bool = False,
    hint: str = "",
) -> float:
    """``value`` as a number from ``lowest`` to ``highest``; integers stay integers.

    Args:
        name: the name of the argument, for the message.
        expected: describes valid values, for the message.
        open_below: whether ``lowest`` itself is excluded.
        open_above: whether ``highest`` itself is excluded.
        hint: appended to the message.

    Raises: TypeError for anything but a number, ValueError out of range or for NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Real):
        raise TypeError(f"{name} must be {expected}, got {value!r}{hint}")
    try:
        as_float = float(value)
    except OverflowError:  # an integer beyond the range of float64
        as_float = math.nan
    number = value if isinstance(value, int) else as_float
    is_excluded = (open_below and number == lowest) or (open_above and number == highest)
    if is_excluded or not lowest <= as_float <= highest:
        raise ValueError(f"{name} must be {expected}, got {_abbreviated(value)}{hint}")
    return number


def _abbreviated(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"
