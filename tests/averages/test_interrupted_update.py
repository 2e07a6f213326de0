"""An interrupted update is finished by the next call, or refused; its step is counted only if it happened."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ema_dist import Compensated, HalfLife, Offloaded, Power, ShardedEMA
from ema_dist.kernels import c_kernel, scratch
from ema_dist.schedules.clock import Clock
from tests.support.interrupter import Interrupter, Interruption
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, averages_of_tracks, make_trained

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


WRITING = ("averages/updates.py", "averages/tracks.py", "averages/offload.py", "kernels/*.py", "schedules/*.py")
SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "equal dtypes": (torch.float32, {}),
    "different dtypes": (torch.bfloat16, {}),
    "stochastic": (torch.bfloat16, {"dtype": torch.bfloat16}),
    "hi/lo": (torch.bfloat16, {"dtype": torch.bfloat16, "rounding": Compensated()}),
    "two tracks": (torch.bfloat16, {"decay": {"a": Power(gamma=1), "b": HalfLife(9, ramp=0.5)}}),
    "compiled": (torch.bfloat16, {"kernel": "compiled"}),
    "offloaded": (torch.bfloat16, {"store": Offloaded(max_pending=2)}),
}


def _make(setting: str) -> tuple[nn.Module, ShardedEMA]:
    torch.manual_seed(0)
    dtype, settings = SETTINGS[setting]
    model = nn.Linear(7, 9).to(dtype)
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    return model, ShardedEMA(model, **{"decay": 0.5} | settings)


def _step(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def test_an_interrupted_update_is_refused_after_weights_were_written_to() -> None:
    model, ema = _make("two tracks")
    counter = Interrupter(WRITING)
    counter.run(ema.update)
    refused = 0
    for point in range(1, counter.count + 1, 10):
        model, ema = _make("two tracks")
        Interrupter(WRITING, point).run(ema.update)
        _step(model)
        try:
            ema.full_state_dict(track="a")
        except RuntimeError as error:
            assert "written to" in str(error)  # noqa: PT017
            refused += 1
            with pytest.raises(RuntimeError, match="update"):
                ema.update()
            assert ema.steps == 0
        else:
            assert ema.steps in (0, 1)
    assert refused > 5


@pytest.mark.world_size(2)
@pytest.mark.parametrize("call", [ShardedEMA.state_dict, ShardedEMA.consolidated_state_dict], ids=lambda f: f.__name__)
def test_ranks_compare_counts_after_it_is_finished(
    call: Callable[[ShardedEMA], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank is interrupted between its last write and the count of the step."""
    model, ema = make_trained("fsdp2")
    steps = ema.steps
    _step(model)

    def interrupt(*_: object) -> None:
        raise Interruption

    if dist.get_rank() == 0:
        with monkeypatch.context() as patched, pytest.raises(Interruption):
            patched.setattr(Clock, "count", interrupt)
            ema.update()
        assert ema.steps == steps
    else:
        ema.update()
    call(ema)
    assert ema.steps == steps + 1


def test_a_signal_waits_for_the_threads_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handler, which raises, runs once all have written."""
    monkeypatch.setattr(c_kernel, "MIN_THREAD_ELEMENTS", 1)
    monkeypatch.setattr(c_kernel, "BLOCK", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    model, ema = _make("compiled")
    averages = averages_of_tracks(ema)
    _step(model)
    submit = c_kernel._submit  # noqa: SLF001  where the main thread is between two threads

    def submit_and_interrupt(task: Callable[[], None], *, threads: int) -> Future[None]:
        monkeypatch.setattr(c_kernel, "_submit", submit)  # a second signal would not be deferred
        signal.raise_signal(signal.SIGUSR1)
        return submit(task, threads=threads)

    def raise_interruption(*_: object) -> None:
        raise Interruption

    monkeypatch.setattr(c_kernel, "_submit", submit_and_interrupt)
    handler = signal.signal(signal.SIGUSR1, raise_interruption)
    with pytest.raises(Interruption):
        ema.update()
    signal.signal(signal.SIGUSR1, handler)
    assert ema.steps == 0
    updated = averages_of_tracks(ema)
    assert ema.steps == 1
    for name, parameter in model.named_parameters():
        before = averages[f"default {name}"]
        torch.testing.assert_close(updated[f"default {name}"], before.lerp(parameter.detach().double(), 0.5))


@pytest.mark.parametrize("found_inf", [False, True], ids=["host", "scaler"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_next_call_finishes_it(setting: str, found_inf: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """At 150 bytecodes from the first to the last; interrupted before its first write, an update has not happened."""
    monkeypatch.setattr(scratch, "CPU_SCRATCH_BYTES", 256)
    arguments = {"found_inf": torch.tensor(0.0)} if found_inf else {}
    model, uninterrupted = _make(setting)
    expected = []
    for _ in range(2):
        expected.append(averages_of_tracks(uninterrupted))
        _step(model)
        uninterrupted.update(elapsed=3, **arguments)
    expected.append(averages_of_tracks(uninterrupted))

    model, ema = _make(setting)
    _step(model)
    ema.update(elapsed=3, **arguments)
    counter = Interrupter(WRITING)
    _step(model)
    counter.run(lambda: ema.update(elapsed=3, **arguments))
    for point in range(1, counter.count + 1, counter.count // 150):
        model, ema = _make(setting)
        _step(model)
        ema.update(elapsed=3, **arguments)
        _step(model)
        Interrupter(WRITING, point).run(lambda: ema.update(elapsed=3, **arguments))  # noqa: B023
        averages = averages_of_tracks(ema)
        assert ema.steps in (1, 2)
        assert ema.time == 3 * ema.steps
        wrong = [n for n, value in expected[ema.steps].items() if not torch.equal(averages[n], value)]
        assert wrong == [], f"bytecode {point}"
