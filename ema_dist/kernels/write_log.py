"""Records which writes of an update are already made, so that an update that was interrupted can be run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class WriteLog:
    """The writes of one update to the averages, in order.

    When the update is run again after `restart`, writes that are made already are skipped.

    A kernel may be interrupted between any two bytecodes. So it computes new values in a scratch, where this can be
    repeated, and makes each write to an average by one call through this object.
    """

    def __init__(self) -> None:
        self._results: list[object] = []
        """The result of each write that is made."""
        self._position = 0
        self._has_begun = False
        self.is_uncertain = False
        """Whether an exception interrupted `write_interruptible`: the write may be made, in part or not at all."""

    @property
    def has_begun(self) -> bool:
        """Whether a write is made, or may be."""
        return self._has_begun or bool(self._results) or self.is_uncertain

    def restart(self) -> None:
        """The next write is the first one again."""
        self._position = 0

    def begin(self) -> None:
        """Mark the update as begun; for kernels that keep their own record of the writes."""
        self._has_begun = True

    def write(self, function: Callable[..., object], *arguments: Any) -> None:  # noqa: ANN401
        """Call ``function``, a builtin, unless this write is made already."""
        position = self._position
        if position == len(self._results):
            # One call of the interpreter makes the write and records it: no exception can come between.
            self._results.extend(map(function, *([argument] for argument in arguments)))
        self._position = position + 1

    def write_interruptible(self, function: Callable[[], object]) -> None:
        """As `write`, for a function in Python, which an exception may interrupt halfway."""
        position = self._position
        if position == len(self._results):
            self.is_uncertain = True
            function()
            self._results.append(None)
            self.is_uncertain: bool = False
        self._position = position + 1
