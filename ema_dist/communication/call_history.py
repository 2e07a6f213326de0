"""The calls that have changed the averages on this rank, so that ranks can compare them when they next communicate."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from struct import Struct
from zlib import crc32

_SHOWN = 4
_pack = Struct("<d").pack


class CallHistory:
    """Counts calls, and keeps a digest of their order. Recording takes well under a microsecond."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._digest = 0
        self._latest: deque[tuple[str, tuple[float, ...]]] = deque(maxlen=_SHOWN)

    def record(self, call: str, *arguments: float) -> None:
        """Add a call that succeeded.

        Args:
            call: as the user writes it, up to its closing parenthesis.
            arguments: numbers that may differ between calls, and must be equal on all ranks.
        """
        # Not hash(): those of texts differ between processes.
        self._digest = crc32(call.encode(), self._digest)
        for argument in arguments:
            self._digest = crc32(_pack(argument), self._digest)
        self._counts[call] = self._counts.get(call, 0) + 1
        self._latest.append((call, arguments))

    def replace(self, call: str, *arguments: float) -> None:
        """Forget all calls but this one, which has set everything that the earlier ones changed."""
        self._digest = 0
        self._counts.clear()
        self._latest.clear()
        self.record(call, *arguments)

    def compared(self, **counts: int) -> Sequence[Mapping[str, str]]:
        """For `rendezvous`: the number of each call, then other ``counts``, then the order of the calls."""
        latest = [call[:-1] + ", ".join(map(repr, arguments)) + ")" for call, arguments in self._latest]
        order = f"called {', '.join(latest)} last, in this order (digest of all calls: {self._digest:08x})"
        return [
            {call: f"called {call} {_times(count)}" for call, count in sorted(self._counts.items())},
            {name: f"{name}={count}" for name, count in counts.items()},
            {"order": order} if latest else {},
        ]


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
