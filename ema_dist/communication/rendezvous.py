"""A rendezvous of ranks before they communicate: a call that some ranks never make fails fast instead of hanging."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import MutableMapping
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import Store

from ema_dist.sharding import world_store

_completed: MutableMapping[object, Counter[tuple[int, ...]]] = WeakKeyDictionary()
"""Number of rendezvous completed in each world by each set of ranks; all ranks derive the next keys from it.

A failed rendezvous is not counted, so that ranks that gave up and ranks that came late agree on the next one.
"""

_answers: MutableMapping[object, dict[str, str]] = WeakKeyDictionary()
"""The answers that each world has agreed on, by question."""

GAVE_UP = json.dumps(["", "this rank had given up waiting"])


class RendezvousError(RuntimeError):
    """stub: replaced by w-agree"""

    def __init__(self, message: str, *, all_came: bool) -> None:
        super().__init__(message)
        self.all_came = all_came


def announce_failure(ranks: list[int], message: str) -> None:
    """stub"""


def require_process_group(call: str, ranks: list[int]) -> None:
    """Raise RuntimeError when ``ranks`` are several and there is no process group for their rendezvous."""
    if len(ranks) > 1 and not dist.is_initialized():
        raise RuntimeError(
            f"{call} needs ranks {ranks} together, and there is no process group any more; "
            "call it before dist.destroy_process_group()"
        )


def agree_on(question: str, answer: str) -> str:
    """The answer of the rank that asked first: the same on every rank, without waiting for other ranks.

    Collective: no; ranks read the answer from the process group's store.
    """
    if not dist.is_initialized():
        return answer
    answers = _answers.setdefault(dist.group.WORLD, {})
    if question not in answers:
        answers[question] = world_store().compare_set(f"ema_dist/{question}", "", answer).decode()
    return answers[question]


def rendezvous(call: str, ranks: list[int], *, timeout: float, problem: str = "") -> None:
    """Return once all of ``ranks`` have entered ``call`` and none reports a problem.

    Args:
        call: the user's call, for comparison between ranks and for messages.
        ranks: global ranks, in order; with fewer than two there is no rank to wait for.
        timeout: seconds.
        problem: why this rank cannot continue; then every rank raises.

    Collective: over ``ranks``, through the process group's store; no tensor is sent.
    Raises: RuntimeError on every rank that came, when one has a problem or made another call; after ``timeout``, with
        the names of the ranks that did not come; and without a process group.
    """
    if len(ranks) < 2:
        if problem:
            raise RuntimeError(problem)
        return
    require_process_group(call, ranks)
    completed = _completed.setdefault(dist.group.WORLD, Counter())
    key = tuple(ranks)
    verdict = _Rendezvous(world_store(), ranks, completed[key]).wait_for_all(call, problem, timeout)
    completed[key] += 1
    if completed[key] > 1:
        # Not the last one: a slower rank may still read its verdict. All ranks have left the one before it.
        _Rendezvous(world_store(), ranks, completed[key] - 2).clear()
    if verdict:
        raise RendezvousError(verdict, all_came="same call" not in verdict)


class _Rendezvous:
    """One rendezvous, and its keys in the store."""

    def __init__(self, store: Store, ranks: list[int], number: int) -> None:
        self._store = store
        self._ranks = ranks
        self._rank = dist.get_rank()
        self._prefix = f"ema_dist/{hash(tuple(ranks))}/{number}"

    def wait_for_all(self, call: str, problem: str, timeout: float) -> str:
        """Wait for all ranks. Returns an empty string, or why none of them can continue."""
        self._store.set(self._key(self._rank), json.dumps([call, problem]))
        if self._store.add(self._key("came"), 1) == len(self._ranks):
            self._store.set(self._key("verdict"), self._decide())
        try:
            self._store.wait([self._key("verdict")], timedelta(seconds=timeout))
        except RuntimeError:  # DistStoreError from some stores, its parent from others
            self._give_up(call, timeout)
        return self._store.get(self._key("verdict")).decode()

    def _decide(self) -> str:
        reports = {rank: json.loads(self._read_report(rank)) for rank in self._ranks}
        calls = {rank: call for rank, (call, _) in reports.items()}
        if len(set(calls.values())) > 1:
            return f"all ranks must make the same call, but they made (rank: call) {calls}"
        problems: dict[str, list[int]] = defaultdict(list)
        for rank, (_, problem) in reports.items():
            problems[problem].append(rank)
        problems.pop("", None)
        return "; ".join(f"on ranks {ranks}: {problem}" for problem, ranks in problems.items())

    def clear(self) -> None:
        """Delete the keys; call it after a later rendezvous is complete, so that all ranks have left this one."""
        self._store.delete_key(self._key(self._rank))
        if self._rank == self._ranks[0]:
            self._store.delete_key(self._key("came"))
            self._store.delete_key(self._key("verdict"))

    def _give_up(self, call: str, timeout: float) -> None:
        if self._store.add(self._key("came"), -1) == len(self._ranks) - 1 or self._store.check([self._key("verdict")]):
            # The last rank came during the timeout and is about to write the verdict: undo the removal and wait for it.
            self._store.add(self._key("came"), 1)
            self._store.wait([self._key("verdict")], timedelta(seconds=timeout))
            return
        self._store.set(self._key(self._rank), GAVE_UP)
        # This rank no longer counts, so the rendezvous can complete only if it comes again.
        others = [rank for rank in self._ranks if rank != self._rank]
        absent = [rank for rank in others if not self._store.check([self._key(rank)])]
        gave_up = [rank for rank in others if rank not in absent and self._read_report(rank) == GAVE_UP]
        reasons = [
            *([f"ranks {absent} did not come"] if absent else ()),
            *([f"ranks {gave_up} had given up before"] if gave_up else ()),
        ]
        raise RendezvousError(
            all_came=False,
            message=f"rank {self._rank} waited {timeout:g} s in {call}: {' and '.join(reasons)}. It needs ranks {self._ranks} "
            "together: call it on each of them, not under `if rank == 0:`; where some are slower than that, "
            "ShardedEMA(..., timeout=seconds) waits longer",
        )

    def _read_report(self, rank: int) -> str:
        return self._store.get(self._key(rank)).decode()

    def _key(self, name: int | str) -> str:
        return f"{self._prefix}/{name}"
