"""A rendezvous of ranks before they communicate: a call that some ranks never make fails fast instead of hanging."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import Store

from ema_dist.communication.outcome import Outcome, Report, compare_reports, describe_calls, ranks_by_value
from ema_dist.communication.store import rendezvous_store
from ema_dist.messages import describe_ranks, runs
from ema_dist.sharding import world_store

_log = logging.getLogger(__name__)

_series: MutableMapping[object, dict[tuple[int, ...], RendezvousSeries]] = WeakKeyDictionary()
"""The rendezvous of each world, by its ranks."""

_answers: MutableMapping[object, dict[str, str]] = WeakKeyDictionary()
"""The answers that each world has agreed on, by question."""

OUTCOME_SECONDS = 10.0
"""After ``timeout``, ranks wait this long (at most ``timeout``) for the outcome of the first rank that gave up."""


CALL_ON_ALL = "call it on every rank, not under `if rank == 0:`"


def advice_on_absence(first: str = CALL_ON_ALL, *, takes_timeout: str = "ShardedEMA") -> str:
    """What to do when ranks do not arrive.

    Args:
        first: what to do first.
        takes_timeout: the function or class that has the parameter ``timeout``.
    """
    return f"{first}; if some ranks need longer, pass a larger {takes_timeout}(..., timeout=seconds)"


class RendezvousError(RuntimeError):
    """A rendezvous failed: the ranks cannot continue together.

    Args:
        message: what happened and what to do.
        same_call: whether every rank has arrived at this call and raises this error now, because one of them reported a
            problem or because they differ. False when ranks are absent, gave up, or made different calls.
        differing: the keys of the compared mappings whose values differ.
        is_final: whether a rank has announced a failure, so that no later rendezvous can succeed.
    """

    def __init__(
        self, message: str, *, same_call: bool = False, differing: Sequence[str] = (), is_final: bool = False
    ) -> None:
        super().__init__(message)
        self.is_final = is_final
        self.same_call = same_call
        self.differing = differing


def require_process_group(call: str, ranks: list[int]) -> None:
    """Raise RendezvousError when ``ranks`` are several and there is no process group for their rendezvous."""
    if len(ranks) > 1 and not dist.is_initialized():
        raise RendezvousError(
            f"{call} must run on {describe_ranks(ranks)} together, but the process group no longer exists: call it "
            "before dist.destroy_process_group()"
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


def rendezvous(
    call: str,
    ranks: list[int],
    *,
    timeout: float,
    problem: str = "",
    compared: Sequence[Mapping[str, str]] = (),
    advice: str = "",
) -> None:
    """Return once all of ``ranks`` have entered ``call``, none reports a problem, and they agree.

    Args:
        call: the user's call with its arguments, for comparison between ranks and for messages.
        ranks: global ranks, in order; with fewer than two there is no rank to wait for.
        timeout: seconds.
        problem: why this rank cannot continue; then every rank raises.
        compared: what must be equal on all ranks, by key; each value completes the sentence "rank 0 has ...". Of
            several mappings, the error describes the first that differs.
        advice: what to do when ranks do not arrive; empty for `advice_on_absence`.

    Collective: over ``ranks``, through the process group's store; no tensor is sent.
    Raises: RendezvousError on every rank that arrived, when one has a problem or made another call, or when ranks
        differ; after ``timeout``, with the names of the ranks that did not arrive; and without a process group.
    """
    if len(ranks) < 2:
        if problem:
            raise RendezvousError(problem, same_call=True)
        return
    require_process_group(call, ranks)
    try:
        outcome = _series_of(ranks).join(rendezvous_store(), Report(call, problem, compared), timeout, advice)
    except RuntimeError as error:
        raise RendezvousError(
            f"{call} must run on {describe_ranks(ranks)} together, but the process group's store failed: {error}. The "
            "process that hosts the store (rank 0, or the launcher) has probably ended: start the job again"
        ) from error
    if outcome.message:
        raise RendezvousError(
            outcome.message, same_call=outcome.same_call, differing=outcome.differing, is_final=outcome.is_final
        )


def announce_failure(ranks: list[int], message: str) -> None:
    """Make the next rendezvous of ``ranks`` fail at once on every other rank, with ``message``.

    Call it on a rank that an exception has interrupted in a collective. It neither waits nor raises an error.

    Collective: no.
    """
    if len(ranks) < 2 or not dist.is_initialized():
        return
    try:
        # Not through the connection of `rendezvous`: another thread may be waiting there.
        _series_of(ranks).announce(world_store(), message)
    except Exception:  # noqa: BLE001  the caller is about to raise its own error
        _log.exception("cannot report this failure to %s: %s", describe_ranks(ranks), message)


def _series_of(ranks: list[int]) -> RendezvousSeries:
    by_ranks = _series.setdefault(dist.group.WORLD, {})
    key = tuple(ranks)
    if key not in by_ranks:
        by_ranks[key] = RendezvousSeries(ranks, dist.get_rank())
    return by_ranks[key]


class RendezvousSeries:
    """The rendezvous of one set of ranks, numbered. Every rank passes all numbers in order.

    Each number gets one outcome: the first one that is written. The last rank to arrive writes it, or a rank that gives
    up, or one that announces a failure. So ranks always agree on which number is next.
    """

    def __init__(self, ranks: list[int], rank: int) -> None:
        self._ranks = ranks
        self._rank = rank
        self._prefix = f"ema_dist/{hash(tuple(ranks))}"
        self._number = 0
        self._entered = -1
        """The number at which this rank last arrived; it equals the current one if an exception ended the wait."""
        self._first_uncleared = 0

    def join(self, store: Store, report: Report, timeout: float, advice: str = "") -> Outcome:
        """Arrive at the next rendezvous and wait for its outcome."""
        if self._entered == self._number:
            self._cancel(store, f"rank {self._rank} was interrupted while it waited")
        outcome = self._join_once(store, report, timeout, advice)
        if not outcome.is_too_late_for(self._rank):
            return outcome
        # Other ranks have given up, perhaps several times, before this rank arrived. They may arrive again.
        missed = outcome
        while outcome.is_too_late_for(self._rank):
            outcome = self._join_once(store, report, timeout, advice)
        if outcome.arrived_runs is not None:
            return replace(outcome, message=f"{outcome.message}. Before rank {self._rank} arrived, {missed.message}")
        return outcome

    def announce(self, store: Store, message: str) -> None:
        """Write ``message`` as the outcome of the first rendezvous that has none."""
        text = Outcome(message, is_final=True).encode()
        decided = None
        while decided != text:
            self._entered = self._number
            decided = self._current(store).decide(text).encode()
            self._number += 1

    def _join_once(self, store: Store, report: Report, timeout: float, advice: str) -> Outcome:
        self._entered = self._number
        current = self._current(store)
        try:
            outcome = current.wait_for_all(report, timeout, advice)
        except BaseException as error:
            try:
                self._cancel(store, f"rank {self._rank} was interrupted in {report.call} by {error!r}")
            except RuntimeError as second_error:  # the next `join` cancels it
                _log.warning("the interrupted rendezvous of %s stays open: %s", report.call, second_error)
            raise
        self._pass(store, outcome)
        return outcome

    def _cancel(self, store: Store, reason: str) -> None:
        self._pass(store, self._current(store).cancel(reason))

    def _pass(self, store: Store, outcome: Outcome) -> None:
        number = self._number
        self._number = number + 1
        if outcome.all_arrived and self._rank == self._ranks[0]:
            # All ranks have arrived here, so none will read an earlier outcome again. Some may still read this one.
            for earlier in range(self._first_uncleared, number):
                self._at(store, earlier).clear()
            self._first_uncleared = number

    def _current(self, store: Store) -> _Rendezvous:
        return self._at(store, self._number)

    def _at(self, store: Store, number: int) -> _Rendezvous:
        return _Rendezvous(store, self._ranks, self._rank, f"{self._prefix}/{number}")


class _Rendezvous:
    """One rendezvous, and its keys in the store."""

    def __init__(self, store: Store, ranks: list[int], rank: int, prefix: str) -> None:
        self._store = store
        self._ranks = ranks
        self._rank = rank
        self._reports = f"{prefix}/reports"
        self._arrived = f"{prefix}/arrived"
        self._gave_up = f"{prefix}/gave-up"
        self._outcome = f"{prefix}/outcome"

    def wait_for_all(self, report: Report, timeout: float, advice: str) -> Outcome:
        """Report, and wait for the outcome; the last rank to arrive decides it."""
        line = f"{self._rank} {report.encode()}\n"
        self._store.append(self._reports, line)  # pyrefly: ignore[missing-attribute]  torch's stubs lack it
        if self._store.add(self._arrived, 1) == len(self._ranks):
            return self.decide(compare_reports(self._read_reports()).encode())
        if self._wait_for_outcome(timeout):
            return self._read_outcome()
        # Of many ranks that give up at the same time, one reads all reports.
        if self._store.add(self._gave_up, 1) > 1 and self._wait_for_outcome(min(OUTCOME_SECONDS, timeout)):
            return self._read_outcome()
        return self.decide(self._outcome_without_absent(report.call, timeout, advice).encode())

    def decide(self, outcome: str) -> Outcome:
        """Set the outcome of this rendezvous, unless it has one. Returns the outcome that it has."""
        decided = self._store.compare_set(self._outcome, "", outcome).decode()
        # Not every TCPStore wakes waiting ranks when `compare_set` creates their key; all do after `set`.
        self._store.set(self._outcome, decided)
        return Outcome.decode(decided)

    def cancel(self, reason: str) -> Outcome:
        """End this rendezvous for all ranks, because this one no longer waits; does nothing if it has an outcome."""
        arrived_runs = runs(sorted({*self._read_reports(), self._rank})) if self.has_begun() else []
        return self.decide(Outcome(reason, arrived_runs=arrived_runs).encode())

    def has_begun(self) -> bool:
        """Whether a rank has arrived."""
        return self._store.check([self._arrived])

    def clear(self) -> None:
        """Delete its keys from the store."""
        for key in (self._reports, self._arrived, self._gave_up, self._outcome):
            self._store.delete_key(key)

    def _outcome_without_absent(self, call: str, timeout: float, advice: str) -> Outcome:
        reports = self._read_reports()
        if len(reports) == len(self._ranks):
            return compare_reports(reports)  # the last rank arrived just now, or ended before it could compare them
        calls = ranks_by_value({rank: Report.decode(text).call for rank, text in reports.items()})
        absent = describe_ranks({*self._ranks} - reports.keys())
        others = f" ({describe_calls(calls)})" if len(calls) > 1 else ""
        return Outcome(
            f"rank {self._rank} waited {timeout:g} s in {call}: {absent} did not arrive{others}. "
            f"{describe_ranks(self._ranks).capitalize()} must make this call together: {advice or advice_on_absence()}",
            arrived_runs=runs(sorted(reports)),
        )

    def _wait_for_outcome(self, seconds: float) -> bool:
        try:
            self._store.wait([self._outcome], timedelta(seconds=seconds))
        except RuntimeError:  # DistStoreError from some stores, its parent from others
            return False
        return True

    def _read_outcome(self) -> Outcome:
        return Outcome.decode(self._store.get(self._outcome).decode())

    def _read_reports(self) -> dict[int, str]:
        lines = self._store.get(self._reports).decode().splitlines()
        return {int(rank): text for rank, text in (line.split(" ", 1) for line in lines)}
