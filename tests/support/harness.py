"""Runs a test on several ranks: a fresh process group in fresh processes, in about a tenth of a second.

The ranks are forked from a server process that has loaded torch. A rank gets the test by module and name, and its
arguments as a pickle. It sends one `Outcome` through its own pipe. When the result of the test is known, all ranks are
killed, and their output is printed for pytest to capture.
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
        # If a framework is not installed, the server ignores the module that cannot be imported.
        "ema_dist.composer",
        "ema_dist.lightning",
        "ema_dist.transformers",
        "ema_dist.accelerate",
        "ema_dist.diffusers",
        "diffusers.training_utils",
        "diffusers.models.unets.unet_2d",
    ]
)

# Here rather than in conftest.py because ranks import this module too: all of them then draw the same examples.
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
    """The number of ranks, the time limit in seconds, the backend of their group, and whether they share a GPU."""

    size: int
    timeout: float = 60.0
    backend: str = "gloo"
    shares_gpu: bool = False


@dataclass(frozen=True)
class RemoteTest:
    """A test function as it is sent to the ranks, with the warning filters that pytest applies to it here."""

    module: str
    name: str
    arguments: bytes
    warning_filters: tuple[str, ...] = ()

    def load(self) -> tuple[Callable[..., object], dict[str, Any]]:
        """Returns the function and its arguments; call it on a rank. Its asserts are rewritten as pytest does."""
        _rewrite_asserts(self.module)
        function = getattr(importlib.import_module(self.module), self.name)
        if hasattr(function, "hypothesis"):
            function = function.hypothesis.inner_test
        return function, pickle.loads(self.arguments)


@dataclass(frozen=True)
class Outcome:
    """How the test ended on one rank."""

    kind: Literal["passed", "skipped", "failed", "died", "hung"]
    text: str = ""


class RanksFailed(Failed):
    """Shows the tracebacks of the ranks, not that of this process, and the example that hypothesis adds as a note."""

    def __str__(self) -> str:
        """The ranks' report, then the example."""
        return "\n".join([str(self.msg), *getattr(self, "__notes__", ())])


def start_server() -> None:
    """Start the server in the background: it loads torch while pytest goes on, so that the first test waits less."""
    forkserver.ensure_running()


def run(test: RemoteTest, world: World) -> None:
    """Run the test on every rank of a fresh world; pass, skip or fail here as it did there."""
    with tempfile.TemporaryDirectory(prefix="world-") as directory:
        ranks: list[_RankProcess] = []
        try:
            ranks.extend(_RankProcess(test, world, rank, Path(directory)) for rank in range(world.size))
            outcomes = _collect_outcomes(ranks)
        finally:
            for process in ranks:
                process.end()
    kinds = {outcome.kind for outcome in outcomes.values()}
    if kinds == {"skipped"}:
        pytest.skip(outcomes[0].text)
    if kinds != {"passed"}:
        raise RanksFailed("\n".join(_describe(outcomes, world)), pytrace=False)


class _RankProcess:
    """One rank, seen from the process that runs pytest."""

    def __init__(self, test: RemoteTest, world: World, rank: int, directory: Path) -> None:
        self.rank = rank
        self.stacks = directory / f"stacks-{rank}.txt"
        self.output = directory / f"output-{rank}.txt"
        self.pipe, write_end = _forkserver_context.Pipe(duplex=False)
        self.process = _forkserver_context.Process(target=_rank_main, args=(test, world, rank, directory, write_end))
        self.process.start()
        write_end.close()  # else `recv` would wait for this copy after the rank has died

    def outcome(self) -> Outcome:
        """Waits until the rank sends its outcome or ends; returns the outcome, or how it ended without one."""
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
        """Kill the rank if it is still running, and print its output."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        if self.output.exists() and (output := self.output.read_text()):
            print(f"--- rank {self.rank}\n{output}")


def _collect_outcomes(ranks: list[_RankProcess]) -> dict[int, Outcome]:
    """Outcomes by rank, in order of arrival; after the first failure, only those that have already arrived."""
    waiting = list(ranks)
    outcomes: dict[int, Outcome] = {}
    grace_seconds = None
    while waiting and (ready := connection.wait([rank.pipe for rank in waiting], grace_seconds)):
        for rank in [rank for rank in waiting if rank.pipe in ready]:
            waiting.remove(rank)
            outcome = outcomes[rank.rank] = rank.outcome()
            if outcome.kind == "hung":
                grace_seconds = 1.0  # its peers reach the time limit now, and their stacks show what they wait for
            elif outcome.kind in {"failed", "died"}:
                grace_seconds = 0.0
    return outcomes


def _describe(outcomes: dict[int, Outcome], world: World) -> list[str]:
    """One paragraph for each rank, in the order in which they ended."""
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


def _rank_main(test: RemoteTest, world: World, rank: int, directory: Path, pipe: connection.Connection) -> None:
    """The main function of a rank's process."""
    with (directory / f"output-{rank}.txt").open("w") as output, (directory / f"stacks-{rank}.txt").open("w") as stacks:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
        faulthandler.enable(stacks)
        faulthandler.dump_traceback_later(world.timeout, exit=True, file=stacks)
        outcome = _run_test(test, world, rank, directory)
        sys.stdout.flush()
        sys.stderr.flush()
        _save_coverage()
        pipe.send(outcome)


def _save_coverage() -> None:
    """Write coverage.py's data of this process. Do so before sending the outcome, as the process may then be killed."""
    coverage: Any = sys.modules.get("coverage")
    measurement = coverage.Coverage.current() if coverage else None
    if measurement:
        measurement.stop()
        measurement.save()


def _run_test(test: RemoteTest, world: World, rank: int, directory: Path) -> Outcome:
    __tracebackhide__ = True
    store = None
    try:
        function, arguments = test.load()
        for warning_filter in test.warning_filters:
            warnings.filterwarnings(*parse_warning_filter(warning_filter, escape=False))
        store = _init_process_group(world, rank, directory)
        function(**arguments)
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early breaks the connections of one that is still at work
            if not torch_2_7.IS_BEFORE_TORCH_2_8:  # torch 2.7 may hang here, and the process ends anyway
                dist.destroy_process_group()
    except pytest.skip.Exception as skipped:
        if store is not None:  # a rank that leaves at once breaks the connections that its peers are still making
            store.wait([_joined_key(peer) for peer in range(world.size)])
        return Outcome("skipped", str(skipped))
    except BaseException as error:  # noqa: BLE001  a rank reports whatever ended it, SystemExit included
        return Outcome("failed", str(pytest.ExceptionInfo.from_exception(error).getrepr(style="short")))
    return Outcome("passed")


def _init_process_group(world: World, rank: int, directory: Path) -> dist.Store:
    """Join the process group of `world`, with the environment variables that torchrun would have set.

    Returns: the store of the group, in which each rank that has joined sets its `_joined_key`.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world.size)}
    device = torch.device("cuda", rank) if "nccl" in world.backend else None
    if device is not None or world.shares_gpu:
        torch.cuda.set_device(device or 0)
    torch_2_7.apply_workarounds(device.type if device else "cpu")
    store = dist.FileStore(str(directory / "store"), world.size)
    dist.init_process_group(
        world.backend,
        store=store,
        rank=rank,
        world_size=world.size,
        timeout=timedelta(seconds=world.timeout),
        device_id=device,
    )
    store.set(_joined_key(rank), "")
    return store


def _joined_key(rank: int) -> str:
    return f"joined-{rank}"


def _rewrite_asserts(module: str) -> None:
    """Import the module as pytest does, with rewritten asserts (from the cache that pytest filled on collection)."""
    config = pytest.Config.fromdictargs({}, ["-c", os.devnull, "--noconftest", "--disable-plugin-autoload"])
    pytest.register_assert_rewrite(module)

    def explain(operator: str, left: object, right: object) -> str | None:
        for lines in config.hook.pytest_assertrepr_compare(config=config, op=operator, left=left, right=right):
            return "\n~".join(line.replace("\n", "\\n") for line in lines).replace("%", "%%")
        return None

    assertion_util._reprcompare = explain  # noqa: SLF001  the hook of rewritten asserts has no public name
