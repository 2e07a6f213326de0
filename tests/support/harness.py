"""Runs a test body on several ranks: a fresh process group in fresh processes, in about a tenth of a second.

The ranks are forked from a server that has torch loaded. A body travels there as its module's and its own name, its
arguments as a pickle; a rank answers once, on a pipe of its own. What it prints is printed here when all is over. Ranks
that are still there when the test is decided are killed.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, Literal

import hypothesis
import pytest
import torch
import torch.distributed as dist
from _pytest.assertion import util as assertion_util
from _pytest.config import default_plugins, parse_warning_filter
from _pytest.outcomes import Failed

from tests.support import torch_2_7

_forkserver_context = multiprocessing.get_context("forkserver")
_forkserver_context.set_forkserver_preload(
    [
        "pytest",
        *(f"_pytest.{plugin}" for plugin in default_plugins),
        "hypothesis",
        "torch",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "ema_dist.checkpoint",
        "ema_dist.composer",  # where Composer is installed: the server passes over what it cannot import
    ]
)

# Here rather than in conftest.py because ranks import this module too: what they draw is then the same on each.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink],
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("repeatable")


@dataclass(frozen=True)
class World:
    """How many ranks a body runs on, for how many seconds at most, and over which backend they talk."""

    size: int
    timeout: float = 60.0
    backend: str = "gloo"


@dataclass(frozen=True)
class RemoteTest:
    """A test function on its way to the ranks, with the warning filters that pytest applies to it here."""

    module: str
    name: str
    arguments: bytes
    warning_filters: tuple[str, ...] = ()

    def load(self) -> tuple[Callable[..., object], dict[str, Any]]:
        """The test function and its arguments, in a rank's process, with asserts that explain themselves."""
        _rewrite_asserts(self.module)
        function = getattr(importlib.import_module(self.module), self.name)
        if hasattr(function, "hypothesis"):
            function = function.hypothesis.inner_test
        return function, pickle.loads(self.arguments)


@dataclass(frozen=True)
class Outcome:
    """What became of one rank."""

    kind: Literal["passed", "skipped", "failed", "died", "hung"]
    text: str = ""


class RanksFailed(Failed):
    """Shows the ranks' own tracebacks in place of one from here, and the example that hypothesis adds as a note."""

    def __str__(self) -> str:
        """The ranks' report, then the example."""
        return "\n".join([str(self.msg), *getattr(self, "__notes__", ())])


def start_server() -> None:
    """Start loading torch in the server, in the background, so that the first test need not wait for all of it."""
    forkserver.ensure_running()


def run(body: RemoteTest, world: World) -> None:
    """Run the body on every rank of a fresh world; pass, skip or fail here as it did there."""
    with tempfile.TemporaryDirectory(prefix="world-") as directory:
        ranks: list[_RankProcess] = []
        try:
            ranks.extend(_RankProcess(body, world, rank, Path(directory)) for rank in range(world.size))
            outcomes = _outcomes(ranks)
        finally:
            for started in ranks:
                started.end()
    kinds = {outcome.kind for outcome in outcomes.values()}
    if kinds == {"skipped"}:
        pytest.skip(outcomes[0].text)
    if kinds != {"passed"}:
        raise RanksFailed("\n".join(_describe(outcomes, world)), pytrace=False)


class _RankProcess:
    """One rank seen from the test's own process."""

    def __init__(self, body: RemoteTest, world: World, rank: int, directory: Path) -> None:
        self.rank = rank
        self.stacks = directory / f"stacks-{rank}.txt"
        self.output = directory / f"output-{rank}.txt"
        self.pipe, pipe = _forkserver_context.Pipe(duplex=False)
        self.process = _forkserver_context.Process(target=_rank_main, args=(body, world, rank, directory, pipe))
        self.process.start()
        pipe.close()

    def outcome(self) -> Outcome:
        """The rank's answer, or how it ended without one. Blocks until there is either."""
        try:
            outcome: Outcome = self.pipe.recv()
        except EOFError:
            self.process.join()
        else:
            return outcome
        stacks = self.stacks.read_text() if self.stacks.exists() else ""
        if stacks.startswith("Timeout"):
            return Outcome("hung", stacks)
        code = self.process.exitcode or 0
        reason = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return Outcome("died", f"{reason}, without an answer\n{stacks}")

    def end(self) -> None:
        """Kill the rank if it is still there, and print what it printed."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        if self.output.exists() and (output := self.output.read_text()):
            print(f"--- rank {self.rank}\n{output}")


def _outcomes(ranks: list[_RankProcess]) -> dict[int, Outcome]:
    """Each rank's outcome, in order of arrival; after the first bad one, only those that are already there."""
    waiting = list(ranks)
    outcomes: dict[int, Outcome] = {}
    grace_seconds = None
    while waiting and (ready := connection.wait([rank.pipe for rank in waiting], grace_seconds)):
        for rank in [rank for rank in waiting if rank.pipe in ready]:
            waiting.remove(rank)
            outcome = outcomes[rank.rank] = rank.outcome()
            if outcome.kind == "hung":
                grace_seconds = 1.0  # its peers reach the limit now: their stacks tell whom it waited for
            elif outcome.kind in {"failed", "died"}:
                grace_seconds = 0.0
    return outcomes


def _describe(outcomes: dict[int, Outcome], world: World) -> list[str]:
    """One paragraph a rank, the one that ended first on top."""
    lines = []
    for rank, outcome in outcomes.items():
        match outcome.kind:
            case "hung":
                verb = f"hung, its stacks after {world.timeout:g} s:\n"
            case "died":
                verb = "died "
            case _:
                verb = f"{outcome.kind}:\n"
        lines.append(f"rank {rank} of {world.size} {verb}{outcome.text}")
    if killed := sorted(set(range(world.size)) - outcomes.keys()):
        lines.append(f"killed without an answer: ranks {killed}")
    return lines


def _rank_main(body: RemoteTest, world: World, rank: int, directory: Path, pipe: connection.Connection) -> None:
    """A rank's whole life."""
    with (directory / f"output-{rank}.txt").open("w") as output, (directory / f"stacks-{rank}.txt").open("w") as stacks:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
        faulthandler.enable(stacks)
        faulthandler.dump_traceback_later(world.timeout, exit=True, file=stacks)
        outcome = _run_test(body, world, rank, directory)
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send(outcome)


def _run_test(body: RemoteTest, world: World, rank: int, directory: Path) -> Outcome:
    __tracebackhide__ = True
    try:
        test, arguments = body.load()
        for warning_filter in body.warning_filters:
            warnings.filterwarnings(*parse_warning_filter(warning_filter, escape=False))
        _init_process_group(world, rank, directory)
        test(**arguments)
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early breaks the connections of one that is still at work
            if not torch_2_7.IS_TORCH_2_7:  # there it may hang, and the process ends anyway
                dist.destroy_process_group()
    except pytest.skip.Exception as skipped:
        return Outcome("skipped", str(skipped))
    except BaseException as error:  # noqa: BLE001  a rank answers whatever ended it, SystemExit included
        return Outcome("failed", str(pytest.ExceptionInfo.from_exception(error).getrepr(style="short")))
    return Outcome("passed")


def _init_process_group(world: World, rank: int, directory: Path) -> None:
    """Enter the world: what torchrun's environment and `init_process_group` would have done."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world.size)}
    device = torch.device("cuda", rank) if "nccl" in world.backend else None
    if device is not None:
        torch.cuda.set_device(device)
    torch_2_7.apply_workarounds(device.type if device else "cpu")
    dist.init_process_group(
        world.backend,
        store=dist.FileStore(str(directory / "store"), world.size),
        rank=rank,
        world_size=world.size,
        timeout=timedelta(seconds=world.timeout),
        device_id=device,
    )


def _rewrite_asserts(module: str) -> None:
    """Import the module as pytest imports it: asserts rewritten (from the cache that collecting it has filled)."""
    config = pytest.Config.fromdictargs({}, ["-c", os.devnull, "--noconftest", "--disable-plugin-autoload"])
    pytest.register_assert_rewrite(module)

    def explain(operator: str, left: object, right: object) -> str | None:
        for lines in config.hook.pytest_assertrepr_compare(config=config, op=operator, left=left, right=right):
            return "\n~".join(line.replace("\n", "\\n") for line in lines).replace("%", "%%")
        return None

    assertion_util._reprcompare = explain  # noqa: SLF001  the hook of rewritten asserts has no public name
