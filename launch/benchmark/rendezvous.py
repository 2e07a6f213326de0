"""Measures a rendezvous on one TCPStore: its time, and the requests that it makes of the store.

    python -m launch.benchmark.rendezvous                   # 16 to 4096 ranks
    python -m launch.benchmark.rendezvous --ranks 16 64

Every rank is a thread with a connection of its own, in one of a few processes. They share this machine's cores with the
store, so the times are upper bounds; the requests are exact.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import torch.distributed as dist

from ema_dist.communication.call_history import CallHistory
from ema_dist.communication.outcome import Report
from ema_dist.communication.rendezvous import RendezvousSeries

PROCESSES = 8
ROUNDS = 7
TIMEOUT_SECONDS = 60.0
MISSING_TIMEOUT_SECONDS = 5.0


class CountingStore:
    """Passes requests on to ``store`` and counts them."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self.requests: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self.requests[name] += 1
        return getattr(self._store, name)


@dataclass(frozen=True)
class Result:
    """One process's part of a measurement.

    Args:
        seconds: time of each rendezvous with all ranks, until the last thread has left it.
        requests: number of requests by each rank, in one such rendezvous.
        missing_seconds: time after the timeout, in a rendezvous at which one rank does not arrive.
        missing_requests: number of requests by all ranks of this process together, in that rendezvous.
    """

    seconds: list[float]
    requests: list[int]
    missing_seconds: float
    missing_requests: int


def run_ranks(port: int, size: int, mine: range, barrier: Barrier) -> Result:
    """Run the ranks ``mine`` of ``size`` in this process."""
    with ThreadPoolExecutor(len(mine)) as pool:
        connect = [pool.submit(dist.TCPStore, "127.0.0.1", port, wait_for_workers=False) for _ in mine]
        stores = [CountingStore(future.result()) for future in connect]
        everyone = [*range(size)]
        series = [RendezvousSeries(everyone, rank) for rank in mine]
        report = Report("swapped()", compared=_example_history().compared(steps=1000, updates=1000))

        def join(seconds: float, arriving_ranks: int) -> float:
            barrier.wait()
            start = time.perf_counter()
            futures = [
                pool.submit(ranks.join, store, report, seconds)  # pyrefly: ignore  it passes for a store
                for rank, ranks, store in zip(mine, series, stores, strict=True)
                if rank < arriving_ranks
            ]
            failed = [future.result().message for future in futures if future.result().message]
            assert bool(failed) == (arriving_ranks < size), failed[:1]
            return time.perf_counter() - start

        def count() -> list[int]:
            return [store.requests.total() for store in stores]

        seconds = [join(TIMEOUT_SECONDS, size) for _ in range(ROUNDS - 1)]
        before = count()
        seconds.append(join(TIMEOUT_SECONDS, size))
        requests = [now - then for now, then in zip(count(), before, strict=True)]
        before = count()
        missing_seconds = join(MISSING_TIMEOUT_SECONDS, size - 1) - MISSING_TIMEOUT_SECONDS
        return Result(seconds, requests, missing_seconds, sum(count()) - sum(before))


def measure(size: int) -> str:
    """One row of the table."""
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ema_dist.communication.rendezvous"])  # else each process imports torch
    count = min(PROCESSES, size)
    with context.Manager() as manager, context.Pool(count) as pool:
        barrier: Any = manager.Barrier(count)
        shares = [range(size * part // count, size * (part + 1) // count) for part in range(count)]
        results = pool.starmap(run_ranks, [(host.port, size, share, barrier) for share in shares], chunksize=1)
    rounds = [max(seconds) for seconds in zip(*(result.seconds for result in results), strict=True)]
    requests = [number for result in results for number in result.requests]
    missing = sum(result.missing_requests for result in results)
    return (
        f"| {size} | {statistics.median(rounds) * 1e3:.0f} ms | {statistics.median(requests):.0f} | {max(requests)} | "
        f"{missing} | {missing / size:.1f} | {max(result.missing_seconds for result in results):.1f} s |"
    )


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    print(
        "| ranks | all arrive: time | requests of a rank, median | most | one is missing: requests, all | per rank |",
        end="",
    )
    print(" time after the timeout |\n|---:|---:|---:|---:|---:|---:|---:|")
    for size in parser.parse_args().ranks:
        print(measure(size), flush=True)


def _example_history() -> CallHistory:
    history = CallHistory()
    for call in ("load_state_dict() with steps=1000", "update()", "swapped()", "update()"):
        history.record(call)
    return history


if __name__ == "__main__":
    main()
