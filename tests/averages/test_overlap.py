"""An update that overlaps what comes next: who waits for whom. The device is a recorder here."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from ema_dist import Offloaded, ShardedEMA
from ema_dist.averages import side_streams
from ema_dist.averages.side_streams import SideStreams
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    assert_bitwise_equal,
    layouts,
    make_net,
    train_step,
    wrap,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


class Stream:
    """Does everything at once."""

    def __init__(self, recorded: list[str], name: str) -> None:
        self._recorded = recorded
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        self._recorded.append(f"{self.name} waits for {other.name}")

    def record_event(self, event: Event) -> None:
        event.name = f"the end of {self.name}"
        self._recorded.append(event.name)

    def wait_event(self, event: Event) -> None:
        self._recorded.append(f"{self.name} waits for {event.name}")


class Event:
    """Has happened as soon as it is recorded."""

    def __init__(self, recorded: list[str]) -> None:
        self._recorded = recorded
        self.name = ""

    def synchronize(self) -> None:
        self._recorded.append(f"{threading.current_thread().name[:8]} waits for {self.name}")


class Recorder:
    """Stands for ``torch.cuda``, and writes down what streams are told."""

    def __init__(self) -> None:
        self.recorded: list[str] = []
        self._current = [Stream(self.recorded, "main")]

    def current_stream(self, _: torch.device) -> Stream:
        return self._current[-1]

    def set_device(self, device: torch.device) -> None:
        self.recorded.append(f"{threading.current_thread().name[:8]} uses {device}")

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def module(self) -> Any:  # noqa: ANN401
        class Module:
            Stream = staticmethod(lambda _: Stream(self.recorded, "side"))
            Event = staticmethod(lambda: Event(self.recorded))  # none that blocks, as on XPU
            current_stream = staticmethod(self.current_stream)
            stream = staticmethod(self.stream)
            set_device = staticmethod(self.set_device)

        return Module

    def read(self) -> list[str]:
        """What was told since the last time."""
        recorded, self.recorded[:] = list(self.recorded), []
        return recorded


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The CPU is a device with streams."""
    recorder = Recorder()
    module = recorder.module()
    monkeypatch.setattr(side_streams, "module_with_streams", lambda _: module)
    return recorder


def step_of(recorder: Recorder, model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], list[str]]]:
    """An optimizer, and what is told while it steps."""

    class SGD(torch.optim.SGD):
        @torch.no_grad()
        def step(self, _: object = None) -> None:
            recorder.recorded.append("weights are written")
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(0.1 * parameter.grad)

    optimizer = SGD(model.parameters(), lr=0.1)

    def step() -> list[str]:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return recorder.read()

    return optimizer, step


UPDATE = ["side waits for main", "the end of side"]
WAIT = "main waits for the end of side"


def test_the_next_step_waits_for_the_update(recorder: Recorder) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model)
    optimizer, step = step_of(recorder, model)
    handle = ema.attach(optimizer, overlap=True)
    assert step() == ["weights are written", *UPDATE]
    assert step()[:2] == [WAIT, "weights are written"]
    handle.remove()
    assert recorder.read() == [WAIT]
    assert step() == ["weights are written"]


def test_every_other_optimizer_waits_too(recorder: Recorder) -> None:
    """With several, the ones that step first write while the update of the step before may still read."""
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model)
    optimizer, step = step_of(recorder, model)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.attach(optimizer, overlap=True)
    step()
    other.step()
    assert recorder.read() == [WAIT]


def evaluate(model: nn.Module) -> None:
    model(torch.ones(1, 2))


@pytest.mark.parametrize(
    "call",
    [
        ShardedEMA.reset,
        ShardedEMA.state_dict,
        ShardedEMA.full_state_dict,
        ShardedEMA.check_replicas,
        lambda ema: ema.swapped()(evaluate)(ema.model),
        lambda ema: ema.serving()(evaluate)(ema.model),
    ],
    ids=["reset", "state_dict", "full_state_dict", "check_replicas", "swapped", "serving"],
)
def test_every_other_call_waits(call: Callable[[ShardedEMA], object], recorder: Recorder) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model)
    optimizer, step = step_of(recorder, model)
    ema.attach(optimizer, overlap=True)
    step()
    call(ema)
    assert recorder.read()[0] == WAIT


def test_an_update_in_order_uses_no_side_stream(recorder: Recorder) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model)
    optimizer, step = step_of(recorder, model)
    ema.update()
    ema.attach(optimizer)
    assert step() == ["weights are written"]


def test_weights_that_a_device_computed_are_kept_for_the_side_stream(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are freed when the update returns, before the side stream has read them."""
    recorded_streams = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: recorded_streams.append((tensor.dtype, stream.name))
    )
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ema.attach(optimizer, overlap=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    assert (torch.float64, "side") in recorded_streams
    assert WAIT not in recorder.read()


def test_freeing_averages_waits_for_the_side_stream(recorder: Recorder) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model)
    optimizer, step = step_of(recorder, model)
    ema.attach(optimizer, overlap=True)
    step()
    gone = weakref.ref(ema)
    del ema, optimizer, step
    gc.collect()
    assert gone() is None
    assert WAIT in recorder.read()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert recorder.read() == []


def test_live_weights_are_copied_on_the_side_stream_and_averaged_by_the_worker(recorder: Recorder) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, decay=0.5, store=Offloaded(pin_memory=False))
    ema.update()
    ema.state_dict()
    recorded = recorder.read()
    assert recorded.index("ema_dist waits for the end of side") > recorded.index("the end of side")
    assert recorded.index(WAIT) > recorded.index("the end of side")  # live weights may be written to from here on
    optimizer, step = step_of(recorder, model)
    ema.attach(optimizer, overlap=True)
    first, second = ([event for event in step() if not event.startswith("ema_dist")] for _ in range(2))
    assert first[-1] == "the end of side"
    assert second[:2] == [WAIT, "weights are written"]


def test_the_worker_uses_the_device_of_the_weights_before_it_waits(recorder: Recorder) -> None:
    """A thread starts on device 0: to wait for an event there takes memory of another rank's GPU."""
    ema = ShardedEMA(nn.Linear(2, 2), decay=0.5, store=Offloaded(pin_memory=False))
    ema.update()
    ema.state_dict()
    told_to_worker = [text for text in recorder.read() if text.startswith("ema_dist")]
    assert told_to_worker[0] == "ema_dist uses cpu"
    assert "ema_dist waits for the end of side" in told_to_worker


def test_buffers_are_copied_before_the_next_forward_pass(recorder: Recorder) -> None:
    model = nn.BatchNorm1d(2)
    ema = ShardedEMA(model, decay=0.5, store=Offloaded(pin_memory=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.attach(optimizer, overlap=True)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    recorded = [event for event in recorder.read() if not event.startswith("ema_dist")]
    buffers = [*UPDATE, *UPDATE, WAIT]  # those averaged, and those copied
    assert recorded[: len(buffers)] == buffers
    assert recorded[len(buffers) :][-1] == "the end of side"


def test_overlapped_updates_are_awaited_after_an_exception(recorder: Recorder) -> None:
    streams = SideStreams([torch.device("cpu")])
    with pytest.raises(MemoryError), streams.fork():
        raise MemoryError
    streams.join()
    assert recorder.read() == [*UPDATE, WAIT]


@layouts("plain", "ddp", "fsdp1", "fsdp2", "hsdp", "tp")
@pytest.mark.parametrize("store", [None, Offloaded()], ids=str)
def test_on_the_cpu_nothing_changes(layout: str, store: Offloaded | None) -> None:
    model = wrap(layout, make_net(layout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ema, reference = ShardedEMA(model, decay=0.8, store=store), ShardedEMA(model, decay=0.8)
    ema.attach(optimizer, overlap=True)
    for step in range(4):
        train_step(model, optimizer, step)
        reference.update()
    assert_bitwise_equal(ema.full_state_dict(), reference.full_state_dict())
