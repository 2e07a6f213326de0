"""The calls that have changed the averages on this rank, so that ranks can compare them when they next communicate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from struct import Struct
from typing import NamedTuple
from zlib import crc32

_SHOWN = 4
_pack = Struct("<d").pack


class Calls(NamedTuple):
    """The calls up to some moment."""

    counts: Mapping[str, int] = {}
    digest: int = 0
    latest: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def after(self, call: str, *arguments: float) -> Calls:
        """These calls and one more; see `CallHistory.record`."""
        # Not hash(): the hash of a string differs between processes.
        digest = crc32(call.encode(), self.digest)
        for argument in arguments:
            digest = crc32(_pack(argument), digest)
        counts = {**self.counts, call: self.counts.get(call, 0) + 1}
        return Calls(counts, digest, (*self.latest[1 - _SHOWN :], (call, arguments)))


class CallHistory:
    """Counts calls, and keeps a digest of their order."""

    def __init__(self) -> None:
        self.calls = Calls()
        """The calls until now, replaced as a whole, so that an interruption cannot record half a call."""

    def __repr__(self) -> str:
        calls = (f"{call} {_times(count)}" for call, count in self.calls.counts.items())
        return f"{type(self).__name__}({', '.join(calls)})"

    def record(self, call: str, *arguments: float) -> None:
        """Add a call that succeeded.

        Args:
            call: as the user writes it, up to its closing parenthesis.
            arguments: numbers that may differ between calls, and must be equal on all ranks.
        """
        self.calls = self.calls.after(call, *arguments)

    def replace(self, call: str, *arguments: float) -> None:
        """Forget all calls but this one, because it has overwritten everything that the earlier ones changed."""
        self.calls: Calls = Calls().after(call, *arguments)

    def compared(self, **counts: float) -> Sequence[Mapping[str, str]]:
        """For `rendezvous`: the number of each call, then other ``counts``, then the order of the calls."""
        latest = [call[:-1] + ", ".join(map(repr, arguments)) + ")" for call, arguments in self.calls.latest]
        order = f"called {', '.join(latest)} last, in this order (digest of all calls: {self.calls.digest:08x})"
        return [
            {call: f"called {call} {_times(count)}" for call, count in sorted(self.calls.counts.items())},
            {name: f"{name}={count}" for name, count in counts.items()},
            {"order": order} if latest else {},
        ]


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
