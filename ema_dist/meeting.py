"""Ranks meet before they communicate, so that a call which some of them never make fails fast instead of hanging."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store

from ema_dist.shards import world_store

_held: Counter[tuple[int, ...]] = Counter()
"""Meetings held by each set of ranks. A failed one is not counted, so the ranks agree on the number of the next."""


def meet(call: str, ranks: list[int], *, timeout: float) -> None:
    """Return once all of ``ranks`` have come to ``call``.

    Args:
        call: what they are about to do, as the user spells it.
        ranks: global ranks, in order; with fewer than two there is nobody to wait for.
        timeout: seconds.

    Collective: over ``ranks``, through the process group's store; no tensor is sent.
    Raises: RuntimeError without a process group, or naming the ranks that did not come in time or made another call.
    """
    if len(ranks) < 2:
        return
    if not dist.is_initialized():
        raise RuntimeError(
            f"{call} needs ranks {ranks} together, and there is no process group any more; "
            "call it before dist.destroy_process_group()"
        )
    key = tuple(ranks)
    different_calls = _Room(world_store(), ranks, _held[key]).wait_for_all(call, timeout)
    _held[key] += 1
    if _held[key] > 1:
        _Room(world_store(), ranks, _held[key] - 2).clear()
    if different_calls:
        raise RuntimeError(f"all ranks must make the same call, but they made (rank: call) {different_calls}")


class _Room:
    """The keys in the store that belong to one meeting."""

    def __init__(self, store: Store, ranks: list[int], number: int) -> None:
        self._store = store
        self._ranks = ranks
        self._me = dist.get_rank()
        self._prefix = f"ema_dist/{hash(tuple(ranks))}/{number}"

    def wait_for_all(self, call: str, timeout: float) -> str:
        """Return when all have come: what they came for if that was not the same, else an empty string."""
        self._store.set(self._key(self._me), call)
        if self._store.add(self._key("came"), 1) == len(self._ranks):
            calls = {rank: self._store.get(self._key(rank)).decode() for rank in self._ranks}
            self._store.set(self._key("verdict"), "" if set(calls.values()) == {call} else str(calls))
        try:
            self._store.wait([self._key("verdict")], timedelta(seconds=timeout))
        except RuntimeError:  # DistStoreError from some stores, its parent from others
            self._give_up(call, timeout)
        return self._store.get(self._key("verdict")).decode()

    def clear(self) -> None:
        """Delete the keys of a meeting that everyone has left, which a later one proves."""
        self._store.delete_key(self._key(self._me))
        if self._me == self._ranks[0]:
            self._store.delete_key(self._key("came"))
            self._store.delete_key(self._key("verdict"))

    def _give_up(self, call: str, timeout: float) -> None:
        if self._store.add(self._key("came"), -1) == len(self._ranks) - 1:
            self._store.add(self._key("came"), 1)  # the last one came in this very moment, and is about to say so
            self._store.wait([self._key("verdict")], timedelta(seconds=timeout))
            return
        self._store.set(self._key(self._me), "")
        others = [rank for rank in self._ranks if rank != self._me]
        never = [rank for rank in others if not self._store.check([self._key(rank)])]
        before = [rank for rank in others if rank not in never and not self._store.get(self._key(rank))]
        absent = [f"ranks {never} did not come"] * bool(never) + [f"ranks {before} had given up before"] * bool(before)
        raise RuntimeError(
            f"rank {self._me} waited {timeout:g} s in {call}: {' and '.join(absent)}. It needs ranks {self._ranks} "
            "together: call it on each of them, not under `if rank == 0:`; where some are slower than that, "
            "ShardedEMA(..., timeout=seconds) waits longer"
        )

    def _key(self, name: int | str) -> str:
        return f"{self._prefix}/{name}"
