"""Raises an exception between any two bytecodes, as a signal handler may."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import ema_dist


class Interruption(BaseException):
    """Stands for the exception that a signal handler raises."""


class Interrupter:
    """Counts the bytecodes that some modules of the package execute, and raises `Interruption` before some of them.

    Args:
        modules: patterns of their paths in the package.
        points: numbers of the bytecodes before which it raises, counted from 1.
    """

    def __init__(self, modules: tuple[str, ...], *points: int) -> None:
        package = Path(ema_dist.__file__).parent
        self._files = {str(path) for pattern in modules for path in package.glob(pattern)}
        if missing := [pattern for pattern in modules if not any(package.glob(pattern))]:
            raise ValueError(f"expected patterns of modules of ema_dist, got {missing}")
        self._points = {*points}
        self.count = 0
        self.raised = 0
        """How many times it has raised `Interruption`."""

    def run(self, call: Callable[[], object]) -> None:
        """Run ``call``, and catch the exception with which it is interrupted."""
        if len(self._points) > 1:
            sys.setprofile(self._trace_again)
        sys.settrace(self._trace)
        try:
            call()
        except Interruption:
            pass
        finally:
            sys.setprofile(None)
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _argument: object) -> Any:  # noqa: ANN401  as settrace wants it
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.count += 1
            if self.count in self._points:
                self.raised += 1
                raise Interruption
        return self._trace

    def _trace_again(self, frame: FrameType, _event: str, _argument: object) -> None:
        # Python ends the tracing of all frames when a trace function raises.
        if sys.gettrace() is None and self.raised < len(self._points):
            outer: FrameType | None = frame
            while outer is not None:
                if outer.f_code.co_filename in self._files:
                    outer.f_trace, outer.f_trace_opcodes = self._trace, True
                outer = outer.f_back
            sys.settrace(self._trace)
