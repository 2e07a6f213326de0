"""What ranks report at a rendezvous, and how it ends: one of them compares the reports for all."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from ema_dist.messages import abbreviated, describe_ranks

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Report:
    """What one rank reports at a rendezvous.

    Args:
        call: the user's call with its arguments.
        problem: why this rank cannot continue; empty if it can.
        compared: what must be equal on all ranks. Each value completes the sentence "rank 0 has ...".
    """

    call: str
    problem: str = ""
    compared: Sequence[Mapping[str, str]] = ()

    def encode(self) -> str:
        """One line of text. Equal reports give equal text."""
        return json.dumps([self.call, self.problem, [*map(dict, self.compared)]])

    @staticmethod
    def decode(text: str) -> Report:
        """The report that `encode` made ``text`` from."""
        return Report(*json.loads(text))


@dataclass(frozen=True)
class Outcome:
    """How a rendezvous ended: the same on every rank.

    Args:
        message: why no rank may continue; empty if all may.
        same_call: whether every rank arrived and made the same call, so that all raise together.
        all_arrived: whether every rank arrived, even if they made different calls.
        arrived_runs: the ranks that had arrived when one gave up or was interrupted, as the first and last rank of each
            run of consecutive ranks; None if no rank gave up or was interrupted.
        differing: the keys of ``compared`` whose values differ.
        is_final: whether no later rendezvous of these ranks can succeed.
    """

    message: str
    same_call: bool = False
    all_arrived: bool = False
    arrived_runs: Sequence[tuple[int, int]] | None = None
    differing: Sequence[str] = ()
    is_final: bool = False

    def encode(self) -> str:
        """One line of text."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> Outcome:
        """The outcome that `encode` made ``text`` from."""
        return Outcome(**json.loads(text))

    def is_too_late_for(self, rank: int) -> bool:
        """Whether others had given up by the time that ``rank`` arrived."""
        return self.arrived_runs is not None and not any(first <= rank <= last for first, last in self.arrived_runs)


def compare_reports(reports: Mapping[int, str]) -> Outcome:
    """The outcome of a rendezvous at which every rank arrived, from the encoded reports by rank."""
    # Of ten thousand ranks nearly all report the same: parse each text once.
    parsed = {text: Report.decode(text) for text in set(reports.values())}
    by_rank = {rank: parsed[text] for rank, text in reports.items()}
    calls = ranks_by_value({rank: report.call for rank, report in by_rank.items()})
    if len(calls) > 1:
        return Outcome(f"all ranks must make the same call: {describe_calls(calls)}", all_arrived=True)
    problems = ranks_by_value({rank: report.problem for rank, report in by_rank.items() if report.problem})
    if problems:
        described = abbreviated(
            (f"{describe_ranks(ranks)} reported: {problem}" for problem, ranks in problems.items()), separator="; "
        )
        return Outcome(f"{next(iter(calls))}: {described}", same_call=True, all_arrived=True)
    if len(parsed) == 1:
        return Outcome("", same_call=True, all_arrived=True)
    differences = _first_differences(by_rank)
    call = next(iter(calls))
    described = abbreviated(differences.values(), separator="; ")
    text = (
        f"{call}: ranks disagree: {described}. Make the same calls with the same settings on every rank; after "
        "different calls, ranks agree again once all have loaded the same checkpoint"
    )
    return Outcome(text if differences else "", same_call=True, all_arrived=True, differing=[*differences])


def describe_calls(calls: Mapping[str, list[int]]) -> str:
    """Which ranks made which call."""
    return abbreviated(f"{describe_ranks(ranks)} made {call}" for call, ranks in calls.items())


def ranks_by_value(values: Mapping[int, K]) -> dict[K, list[int]]:
    """The ranks that have each value, in the order of their first ranks."""
    ranks: dict[K, list[int]] = {}
    for rank in sorted(values):
        ranks.setdefault(values[rank], []).append(rank)
    return ranks


def _first_differences(reports: Mapping[int, Report]) -> dict[str, str]:
    """Describes, by key, the differences in the first compared mapping that is not equal on all ranks."""
    for position in range(max(len(report.compared) for report in reports.values())):
        entries = {
            rank: report.compared[position] if position < len(report.compared) else {}
            for rank, report in reports.items()
        }
        keys = dict.fromkeys(key for mapping in _distinct(entries.values()) for key in mapping)
        differences = {}
        for key in keys:
            by_value = ranks_by_value({rank: mapping.get(key, "not") for rank, mapping in entries.items()})
            if len(by_value) > 1:
                # "rank 1 has called x, rank 0 has not" reads better than the reverse.
                positive_first = sorted(by_value.items(), key=lambda item: item[0] == "not")
                differences[key] = abbreviated(
                    f"{describe_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} {value}"
                    for value, ranks in positive_first
                )
        if differences:
            return differences
    return {}


def _distinct(mappings: Iterable[Mapping[str, str]]) -> Iterable[Mapping[str, str]]:
    """Each object once; ranks with equal reports share one."""
    return {id(mapping): mapping for mapping in mappings}.values()
