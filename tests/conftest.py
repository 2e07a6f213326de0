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


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers."""
    config.addinivalue_line(
        "markers", "world_size(size, timeout=60): run the test on `size` ranks, for `timeout` seconds at most"
    )
    config.addinivalue_line("markers", "slow: takes most of a minute; `-m 'not slow'` leaves it out, and CI runs it")
    config.addinivalue_line("markers", "gpu: needs CUDA, one device for each rank; the ranks communicate through NCCL")
    for text in torch_2_7.WARNINGS:
        config.addinivalue_line("filterwarnings", text)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server that ranks are forked from if a test needs ranks."""
    if any(item.get_closest_marker("world_size") for item in session.items):
        harness.start_server()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run."""
    if item.get_closest_marker("gpu"):
        ranks = _world(item).size
        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")
        if torch.cuda.device_count() < ranks:
            pytest.skip(f"needs {ranks} CUDA devices, one a rank")


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
    return dataclasses.replace(world, backend="cpu:gloo,cuda:nccl") if item.get_closest_marker("gpu") else world


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
