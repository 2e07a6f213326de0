"""The history tells ranks apart that have called other things, in other order or with other arguments."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ema_dist.communication.call_history import CallHistory
from ema_dist.communication.outcome import Report, compare_reports
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


def history(calls: Sequence[tuple[str, float]]) -> CallHistory:
    made = CallHistory()
    for call, *arguments in calls:
        made.record(call, *arguments)
    return made


def outcome(*histories: CallHistory) -> str:
    reports = {rank: Report("save()", compared=each.compared()) for rank, each in enumerate(histories)}
    return compare_reports({rank: report.encode() for rank, report in reports.items()}).message


UPDATES = [("update()", 0.5), ("update()", 0.25)]


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([*UPDATES, ("swapped()",)], ["rank 0 has not", "rank 1 has called swapped() once"]),
        (UPDATES[:1], ["rank 0 has called update() twice", "rank 1 has called update() once"]),
        (UPDATES * 2, ["rank 0 has called update() twice", "rank 1 has called update() 4 times"]),
        (UPDATES[::-1], ["update(0.5), update(0.25)", "update(0.25), update(0.5)"]),
        ([], ["rank 0 has called update() twice", "rank 1 has not"]),
    ],
)
def test_other_calls_are_described(calls: Sequence[tuple[str, float]], words: list[str]) -> None:
    message = outcome(history(UPDATES), history(calls))
    assert all(word in message for word in words), message
    assert "order" not in message or len(calls) == len(UPDATES)
    assert not outcome(history(calls), history(calls))


def test_an_order_that_is_no_longer_shown_still_differs() -> None:
    """Only the latest calls are kept."""
    calls = [("update()",), ("swapped()",)]
    updates = [("update()",)] * 100
    assert outcome(history([*calls, *updates]), history([*calls[::-1], *updates]))


def test_what_replaces_the_history_is_all_that_counts() -> None:
    here, there = history(UPDATES), history([("swapped()",)])
    for each in (here, there):
        each.replace("load_state_dict()")
        each.record("update()")
    assert not outcome(here, there)
