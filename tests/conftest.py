"""Settings for every test: one thread in each rank, and the markers `world_size`, `gpu` and `slow`."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads: the ranks of a test share two cores

import dataclasses
import pickle
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.support import harness, torch_2_7

GPU_WARNINGS = (
    "ignore:Synchronization debug mode is a prototype feature:UserWarning",
    "ignore:Warning. Profiler clears events:UserWarning",
    # FSDP1 on one rank, which is the most that NCCL allows on one GPU.
    "ignore:FSDP is switching to use `NO_SHARD`:UserWarning",
    "ignore:The `NO_SHARD` sharding strategy is deprecated:FutureWarning",
    "ignore:serving\\(\\) swaps the averages into the model:UserWarning",
    "ignore:Please use DTensor instead:FutureWarning",
    "ignore:`_get_pg_default_device` will be deprecated:UserWarning",
    "ignore:Multiple backends are registered with this ProcessGroup:UserWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers."""
    config.addinivalue_line(
        "markers", "world_size(size, timeout=60): run the test on `size` ranks, for `timeout` seconds at most"
    )
    config.addinivalue_line("markers", "slow: takes most of a minute; `-m 'not slow'` leaves it out, and CI runs it")
    config.addinivalue_line(
        "markers",
        "gpu(shared=False): needs CUDA, one device for each rank; the ranks communicate through NCCL. If shared, all "
        "ranks use the first device, and communicate through gloo, since NCCL cannot",
    )
    for text in torch_2_7.WARNINGS:
        config.addinivalue_line("filterwarnings", text)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server that ranks are forked from if a test needs ranks."""
    if any(item.get_closest_marker("world_size") for item in session.items):
        harness.start_server()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let pass what torch warns of on every GPU, or of a single rank."""
    for text in GPU_WARNINGS if item.get_closest_marker("gpu") else ():
        item.add_marker(pytest.mark.filterwarnings(text))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run."""
    if item.get_closest_marker("gpu"):
        world = _world(item)
        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")
        if not world.shares_gpu and torch.cuda.device_count() < world.size:
            pytest.skip(f"needs {world.size} CUDA devices, one a rank")


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Run a `world_size` test on its ranks; with hypothesis, each example in a fresh world."""
    if pyfuncitem.get_closest_marker("world_size") is None:
        return

    test = pyfuncitem.function
    filters = (*pyfuncitem.config.getini("filterwarnings"), *_marked_warning_filters(pyfuncitem))

    def run(**arguments: object) -> None:
        remote_test = harness.RemoteTest(test.__module__, test.__name__, pickle.dumps(arguments), filters)
        harness.run(remote_test, _world(pyfuncitem))

    if hypothesis.is_hypothesis_test(test):
        run.__name__ = test.__name__
        test.hypothesis.inner_test = run
    else:
        pyfuncitem.obj = run


def _world(item: pytest.Item) -> harness.World:
    marker = item.get_closest_marker("world_size")
    world = harness.World(*marker.args, **marker.kwargs) if marker else harness.World(1)
    gpu = item.get_closest_marker("gpu")
    if gpu is None:
        return world
    if gpu.kwargs.get("shared"):
        return dataclasses.replace(world, shares_gpu=True)
    return dataclasses.replace(world, backend="cpu:gloo,cuda:nccl")


def _marked_warning_filters(item: pytest.Item) -> list[str]:
    return [text for marker in item.iter_markers("filterwarnings") for text in marker.args]


@pytest.fixture
def eager() -> Iterator[None]:
    """Compile nothing in this process: compiling what some optimizers compile takes longer than their tests."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def sigint_interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, although a process that a shell started in the background ignores it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
