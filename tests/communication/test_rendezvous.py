"""The protocol in the store, by ranks that are threads: who arrived, who gave up, and what comes next."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import Store

from ema_dist.communication.outcome import Outcome, Report, compare_reports
from ema_dist.communication.rendezvous import RendezvousSeries, announce_failure, rendezvous
from ema_dist.communication.store import rendezvous_store
from ema_dist.messages import describe_ranks
from ema_dist.sharding import world_store
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


STORES = ["tcp", "tcp without libuv", "file", "memory"]


class CountingStore:
    """Passes requests on to ``store`` and counts them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.requests: list[str] = []
        self.fail_once: dict[str, BaseException] = {}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        self.requests.append(name)
        if error := self.fail_once.pop(name, None):
            raise error
        return getattr(self._store, name)


class Ranks:
    """Ranks that share a store, each with a connection of its own."""

    def __init__(self, kind: str, size: int, folder: Path) -> None:
        self.stores = [CountingStore(store) for store in _connect(kind, size, folder)]
        ranks = [*range(size)]
        self.series = [RendezvousSeries(ranks, rank) for rank in ranks]

    def join(self, rank: int, call: str = "call()", timeout: float = 10.0, **report: Any) -> Outcome:  # noqa: ANN401
        store: Any = self.stores[rank]
        return self.series[rank].join(store, Report(call, **report), timeout)

    def all_join(self) -> list[Outcome]:
        return self.run(self.join)

    def run(self, body: Callable[[int], Any], ranks: list[int] | None = None) -> list[Any]:
        with ThreadPoolExecutor(len(self.series)) as pool:
            return [*pool.map(body, range(len(self.series)) if ranks is None else ranks)]


def _connect(kind: str, size: int, folder: Path) -> list[Store]:
    match kind:
        case "file":
            return [dist.FileStore(str(folder / "store"), size) for _ in range(size)]
        case "memory":
            return [dist.HashStore()] * size
    options: dict[str, Any] = {"wait_for_workers": False, "use_libuv": kind == "tcp"}
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, **options)
    return [host, *(dist.TCPStore("127.0.0.1", host.port, **options) for _ in range(size - 1))]


@pytest.mark.parametrize("kind", STORES)
def test_ranks_that_give_up_or_come_late_agree_on_what_is_next(kind: str, tmp_path: Path) -> None:
    """Each rank makes ten calls, at random times and with short timeouts: all see the same ones succeed."""
    ranks = Ranks(kind, 3, tmp_path)

    def run(rank: int) -> list[str]:
        delays = random.Random(rank)
        outcomes = []
        for _ in range(10):
            time.sleep(delays.choice([0, 0, 0, 0.02, 0.05]))
            outcomes.append(ranks.join(rank, timeout=0.04).message)
        while ranks.join(rank, "end()").message:
            pass  # others are still at call()
        return outcomes

    outcomes = ranks.run(run)
    assert len({each.count("") for each in outcomes}) == 1, outcomes
    assert {outcome.message for outcome in ranks.all_join()} == {""}


@pytest.mark.parametrize("kind", STORES)
def test_one_rank_alone_can_give_up_any_number_of_times(kind: str, tmp_path: Path) -> None:
    ranks = Ranks(kind, 3, tmp_path)
    for _ in range(3):
        outcome = ranks.join(1, timeout=0.02)
        assert not outcome.same_call
        assert "rank 1 waited 0.02 s in call(): ranks 0, 2 did not arrive" in outcome.message
    assert {outcome.message for outcome in ranks.all_join()} == {""}
    assert ranks.join(0, timeout=0.02).message


def test_a_late_rank_learns_why_nobody_is_there(tmp_path: Path) -> None:
    ranks = Ranks("memory", 2, tmp_path)
    ranks.join(0, "swapped()", timeout=0.02)
    message = ranks.join(1, "save()", timeout=0.03).message
    assert "rank 1 waited 0.03 s in save()" in message
    assert "rank 0 waited 0.02 s in swapped()" in message


def test_all_waiting_ranks_learn_from_the_first_that_gives_up(tmp_path: Path) -> None:
    ranks = Ranks("tcp", 4, tmp_path)
    start = time.monotonic()
    outcomes = ranks.run(lambda rank: ranks.join(rank, timeout=0.1 if rank == 2 else 30), ranks=[0, 2, 3])
    assert time.monotonic() - start < 15
    assert len({outcome.message for outcome in outcomes}) == 1
    assert "rank 2 waited 0.1 s in call(): rank 1 did not arrive" in outcomes[0].message


def test_requests_per_rank_do_not_grow_with_the_ranks(tmp_path: Path) -> None:
    most = {}
    for size in (2, 32):
        ranks = Ranks("memory", size, tmp_path)
        for _ in range(3):
            ranks.all_join()
        most[size] = max(len(store.requests) for store in ranks.stores)
    assert max(most.values()) <= 3 * 9


def test_requests_in_total_when_a_rank_is_missing(tmp_path: Path) -> None:
    """A few for each rank, and not one for each pair."""
    ranks = Ranks("memory", 32, tmp_path)
    outcomes = ranks.run(lambda rank: ranks.join(rank, timeout=0.5), ranks=[*range(31)])
    assert all("rank 31 did not arrive" in outcome.message for outcome in outcomes)
    assert sum(len(store.requests) for store in ranks.stores) <= 8 * 32


def test_keys_do_not_pile_up(tmp_path: Path) -> None:
    ranks = Ranks("memory", 2, tmp_path)
    for _ in range(5):
        ranks.join(1, timeout=0.01)
        ranks.all_join()
    store: Any = ranks.stores[0]
    assert store.num_keys() <= 3


@pytest.mark.parametrize("requests", [["append"], ["add"], ["wait"], ["wait", "compare_set"], ["wait", "set"]])
def test_a_rank_that_is_interrupted_no_longer_counts(requests: list[str], tmp_path: Path) -> None:
    """Also when a second interrupt, or an error of the store, hits while it cancels it."""
    ranks = Ranks("memory", 2, tmp_path)
    store = ranks.stores[0]
    for request, error in zip(requests, [KeyboardInterrupt, RuntimeError], strict=False):
        store.fail_once[request] = error()
    with pytest.raises(KeyboardInterrupt):
        ranks.join(0)
    assert not store.fail_once
    ranks.join(1, timeout=0.02)
    assert {outcome.message for outcome in ranks.all_join()} == {""}


def test_those_who_wait_learn_of_an_interrupted_rank_at_once(tmp_path: Path) -> None:
    ranks = Ranks("tcp", 3, tmp_path)

    def run(rank: int) -> str:
        if rank == 0:
            time.sleep(0.2)
            ranks.stores[0].fail_once["wait"] = KeyboardInterrupt("^C")
        try:
            return ranks.join(rank).message
        except KeyboardInterrupt:
            return ""

    interrupted, message = ranks.run(run, ranks=[0, 1])
    assert not interrupted
    assert "rank 0 was interrupted in call()" in message
    assert "^C" in message


def test_a_failure_is_announced_to_the_next_rendezvous(tmp_path: Path) -> None:
    """At once, whatever has happened to earlier ones, and only once."""
    ranks = Ranks("tcp", 3, tmp_path)
    ranks.all_join()
    ranks.join(1, timeout=0.02)
    store: Any = ranks.stores[2]
    ranks.series[2].announce(store, "rank 2 lost it")
    outcomes = ranks.run(ranks.join, ranks=[0, 1])
    assert {(outcome.message, outcome.same_call) for outcome in outcomes} == {("rank 2 lost it", False)}
    assert {outcome.message for outcome in ranks.all_join()} == {""}


@pytest.mark.parametrize(
    ("reports", "same_call", "words"),
    [
        ([Report("a()"), Report("b()"), Report("a()")], False, ["ranks 0, 2 made a()", "rank 1 made b()"]),
        ([Report("a()"), Report("a()", "no"), Report("a()", "no")], True, ["a()", "ranks 1-2", "no"]),
        (
            [Report("a()", compared=[{"x": "x=1", "y": "y=1"}, {"z": f"z={rank}"}]) for rank in (0, 1)]
            + [Report("a()", compared=[{"x": "x=2", "y": "y=1"}])],
            True,
            ["ranks 0-1 have x=1", "rank 2 has x=2"],
        ),
        ([Report("a()", compared=[{}, {"z": "z=0"}]), Report("a()")], True, ["rank 0 has z=0", "rank 1 has not"]),
    ],
)
def test_what_differs_is_described(reports: list[Report], *, same_call: bool, words: list[str]) -> None:
    outcome = compare_reports({rank: report.encode() for rank, report in enumerate(reports)})
    assert outcome.same_call == same_call
    assert all(word in outcome.message for word in words)
    assert "z=1" not in outcome.message
    assert "y=1" not in outcome.message


def test_many_ranks_are_abbreviated() -> None:
    assert describe_ranks([1]) == "rank 1"
    assert describe_ranks({0, *range(2, 10_000)}) == "ranks 0, 2-9999"
    assert len(describe_ranks(range(0, 10_000, 2))) < 100
    reports = {rank: Report("a()", f"problem {rank}", [{"x": f"x={rank}"}]).encode() for rank in range(10_000)}
    assert len(compare_reports(reports).message) < 1000


@pytest.mark.world_size(1)
def test_a_wait_leaves_the_connection_of_the_process_group_free() -> None:
    """Over one connection, NCCL's heartbeat would wait as long as a rendezvous does."""
    dist.destroy_process_group()
    for _ in range(2):
        host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        dist.init_process_group("gloo", store=host, rank=0, world_size=1)
        store = rendezvous_store()
        assert store is rendezvous_store()
        world_store().set("key", "value")
        assert store.get("key") == b"value"
        if hasattr(host, "clone"):
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(store.wait, ["other key"])
                time.sleep(0.1)
                world_store().set("other key", "")
                waiting.result(timeout=10)
        dist.destroy_process_group()
    rendezvous("alone()", [0], timeout=1)
    announce_failure([0, 1], "there is no process group")
