"""Helpers that format error messages and issue warnings."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from inspect import currentframe

_package_logger = logging.getLogger(__package__)


def abbreviated(names: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """The first ``limit`` names and the number of the others: a model has thousands of tensors."""
    all_names = list(names)
    more = f" and {len(all_names) - limit} more" if len(all_names) > limit else ""
    return separator.join(all_names[:limit]) + more


def describe_difference(left: str, left_names: AbstractSet[str], right: str, right_names: AbstractSet[str]) -> str:
    """Which names only the left side has and which only the right side has; empty if both have the same names.

    Args:
        left: how the message calls the left side.
        right: how the message calls the right side.
    """
    only_in = {left: left_names - right_names, right: right_names - left_names}
    return "; ".join(f"only {label} has {abbreviated(sorted(names))}" for label, names in only_in.items() if names)


def add_note(error: BaseException, note: str) -> None:
    """Add ``note`` to the traceback of ``error``; Python 3.10 keeps notes without printing them."""
    vars(error)["__notes__"] = [*getattr(error, "__notes__", ()), note]


def log_visibly(logger: logging.Logger, level: int, message: str) -> None:
    """Log a problem that no later call may report; print it to stderr too if the program has not configured logging."""
    logger.log(level, "%s", message)
    if not logging.root.handlers and all(isinstance(it, logging.NullHandler) for it in _package_logger.handlers):
        sys.stderr.write(f"{logger.name}: {message}\n")


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the program that called into `ema_dist`, however deep the calls are in between."""
    level, frame = 1, currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def describe_ranks(ranks: Iterable[int]) -> str:
    """Ranks as text: "rank 1", or "ranks 0, 2-9999" with at most eight ranges."""
    numbers = sorted(ranks)
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs(numbers)]
    return f"rank{'s' * (len(numbers) != 1)} {abbreviated(parts, limit=8)}"


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The first and last number of each run of consecutive integers in ``numbers``, which are in ascending order."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
