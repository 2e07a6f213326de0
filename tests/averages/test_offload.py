"""Averages updated on the CPU by a thread are bit-identical to those of an update in place, only later."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement

from ema_dist import Compensated, HalfLife, Offloaded, ShardedEMA, Stochastic, checkpoint
from ema_dist.averages import offload
from ema_dist.averages.offload import Worker
from ema_dist.averages.precision import Precision
from ema_dist.averages.track import Track
from ema_dist.evaluation.serving import Serving
from ema_dist.kernels import HostBuffer, HostCopier, host_copy
from ema_dist.sharding import Layout
from ema_dist.sharding.mesh_shard import MeshShard
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    IGNORED_WARNINGS,
    STORAGE_LAYOUTS,
    assert_bitwise_equal,
    evaluate,
    full_weights,
    layouts,
    make_net,
    make_trained,
    peak_memory,
    train_step,
    wrap,
)
from tests.support.reshard_cases import run_in_world

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING

few_layouts = layouts("plain", "ddp-3", "fsdp1", "hsdp")
some_layouts = layouts("plain", "ddp-3", "fsdp1", "fsdp2-3", "hsdp", "tp", "fsdp2-tp")


class OffloadedAndInPlace:
    """A trained model with averages of both kinds, which follow it side by side."""

    def __init__(self, layout: str, store: Offloaded = Offloaded(), **settings: Any) -> None:  # noqa: ANN401, B008
        self.model = wrap(layout, make_net(layout))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.in_place = ShardedEMA(self.model, **{"decay": 0.8} | settings)
        self.ema = ShardedEMA(self.model, store=store, **{"decay": 0.8} | settings)
        self.train(5)

    def train(self, steps: int, **arguments: Any) -> None:  # noqa: ANN401
        for _ in range(steps):
            train_step(self.model, self.optimizer, self.ema.steps)
            for ema in (self.in_place, self.ema):
                ema.update(**arguments)

    def assert_alike(self) -> None:
        for track in self.ema.tracks:
            actual, expected = (
                ema.full_state_dict(dtype=torch.float64, track=track) for ema in (self.ema, self.in_place)
            )
            assert_bitwise_equal(actual, expected)
        assert (self.ema.steps, self.ema.updates) == (self.in_place.steps, self.in_place.updates)


@layouts(*STORAGE_LAYOUTS, "fsdp2-keep", "fsdp1-flat-grad-op")
def test_averages_are_those_of_an_update_in_place(layout: str) -> None:
    OffloadedAndInPlace(layout).assert_alike()


@few_layouts
@pytest.mark.parametrize(
    "settings",
    [
        {"decay": {"short": HalfLife(1), "long": HalfLife(20)}},
        {"start": 2, "update_interval": 2},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64, "buffers": "copy"},
        {"replicas": "copy", "store": Offloaded(pin_memory=False, max_pending=3)},
    ],
    ids=str,
)
def test_offloaded_averages_match_under_all_settings(layout: str, settings: dict[str, Any]) -> None:
    OffloadedAndInPlace(layout, **settings).assert_alike()


@few_layouts
@pytest.mark.parametrize("rounding", [Stochastic(seed=7), Compensated()], ids=str)
def test_bfloat16_averages_are_rounded_as_in_place(
    layout: str, rounding: Stochastic | Compensated, tmp_path: Path
) -> None:
    model = wrap(layout, make_net(layout).bfloat16())
    settings: dict[str, Any] = {"decay": 0.9, "dtype": torch.bfloat16, "rounding": rounding}
    in_place, ema = ShardedEMA(model, **settings), ShardedEMA(model, **settings, store=Offloaded())
    for step in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.875)
        for each in (in_place, ema):
            each.update(found_inf=torch.tensor(0.0) if step > 3 else None)
    expected = in_place.full_state_dict(dtype=torch.float32)
    assert_bitwise_equal(ema.full_state_dict(dtype=torch.float32), expected)
    with ema.swapped():
        assert_bitwise_equal(ema.full_state_dict(dtype=torch.float32), expected)
    checkpoint.save({"ema": ema}, tmp_path, step=6)
    resumed = ShardedEMA(model, **settings, store=Offloaded())
    checkpoint.load({"ema": resumed}, tmp_path)
    assert_bitwise_equal(resumed.full_state_dict(dtype=torch.float32), expected)


@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_a_step_left_out_on_the_device_is_left_out(skipped: float) -> None:
    both = OffloadedAndInPlace("plain")
    both.train(2, found_inf=torch.tensor(skipped))
    both.assert_alike()
    assert both.ema.updates == (5 if skipped else 7)


@pytest.mark.parametrize("overlap", [False, True])
def test_attached_to_a_fused_optimizer_it_leaves_out_what_a_scaler_skips(overlap: bool) -> None:  # noqa: FBT001
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    in_place, ema = ShardedEMA(model, decay=0.5), ShardedEMA(model, decay=0.5, store=Offloaded())
    handle = ema.attach(optimizer, overlap=overlap)
    in_place.attach(optimizer)
    for step in range(4):
        scaler.scale(model(torch.ones(1, 3)).sum()).backward()
        if step == 2:
            model.weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert ema.steps == in_place.steps == 3
    assert_bitwise_equal(ema.full_state_dict(), in_place.full_state_dict())
    handle.remove()
    optimizer.step()
    assert ema.steps == 3


@some_layouts
def test_swaps_show_the_averages_and_give_the_live_weights_back(layout: str) -> None:
    both = OffloadedAndInPlace(layout)
    live = full_weights(both.model)
    with both.in_place.swapped():
        averaged = full_weights(both.model)
    with both.ema.swapped():
        assert_bitwise_equal(full_weights(both.model), averaged)
        both.assert_alike()
    assert_bitwise_equal(full_weights(both.model), live)
    both.train(2)
    both.assert_alike()


@some_layouts
@pytest.mark.filterwarnings(r"ignore:.*serving\(\).*averages")  # FSDP1
def test_serving_reads_offloaded_averages(layout: str) -> None:
    both = OffloadedAndInPlace(layout)
    with both.in_place.serving():
        expected = evaluate(both.model)
    with both.ema.serving():
        assert torch.equal(evaluate(both.model), expected)
    both.train(1)
    both.assert_alike()


@some_layouts
def test_offloaded_averages_load_full_tensors_and_copy_to_models(layout: str) -> None:
    both = OffloadedAndInPlace(layout)
    for ema in (both.in_place, both.ema):
        ema.load_full_state_dict(make_net(layout, seed=1).state_dict())
    both.train(2)
    both.assert_alike()
    target = make_net(layout, seed=2)
    both.ema.copy_to(target)
    if full := both.ema.full_state_dict():
        assert_bitwise_equal(target.state_dict(), full)


@pytest.mark.world_size(4)
@pytest.mark.parametrize(
    ("source_layout", "target_layout"),
    [("ddp", "fsdp2"), ("fsdp2", "hsdp"), pytest.param("fsdp1-hybrid", "fsdp1", marks=IGNORED_WARNINGS)],
)
@pytest.mark.parametrize("stores", [(Offloaded(), None), (None, Offloaded()), (Offloaded(), Offloaded())], ids=str)
def test_averages_resume_from_either_store(
    source_layout: str, target_layout: str, stores: tuple[Offloaded | None, Offloaded | None], tmp_path: Path
) -> None:
    def save() -> None:
        model, ema = make_trained(source_layout, make_net(source_layout, target_layout), store=stores[0])
        checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=3)
        torch.save(ema.full_state_dict(), tmp_path / f"{dist.get_rank()}.pt")

    def load() -> None:
        model = wrap(target_layout, make_net(source_layout, target_layout, seed=1))
        ema = ShardedEMA(model, decay=0.8, store=stores[1])
        checkpoint.load({"model": model, "ema": ema}, tmp_path / "root")
        assert ema.updates == 3
        if full := ema.full_state_dict():
            assert_bitwise_equal(full, torch.load(tmp_path / "0.pt"))

    run_in_world(4, tmp_path, save)
    run_in_world(4, tmp_path, load)


@layouts("plain", "fsdp2")
def test_weights_that_are_cast_are_followed(layout: str) -> None:
    both = OffloadedAndInPlace(layout)
    both.model.to(torch.bfloat16)
    for _ in range(2):
        for ema in (both.in_place, both.ema):
            ema.update()
    both.assert_alike()


def test_buffers_that_are_replaced_are_followed() -> None:
    model = nn.BatchNorm1d(3)
    ema = ShardedEMA(model, decay=0.5, store=Offloaded())
    for value in (4.0, 8.0):
        model.running_mean = torch.full((3,), value)
        model.num_batches_tracked = torch.tensor(int(value))
        ema.update()
    assert torch.equal(ema.full_state_dict()["running_mean"], torch.full((3,), 5.0))
    assert ema.full_state_dict()["num_batches_tracked"] == 8


def test_buffers_that_are_copied_are_so_between_intervals_too() -> None:
    model = nn.BatchNorm1d(3)
    ema = ShardedEMA(model, decay=0.5, update_interval=5, store=Offloaded())
    model.num_batches_tracked.fill_(7)
    ema.update()
    assert ema.full_state_dict()["num_batches_tracked"] == 7


class Gate:
    """Holds the worker before each update until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._run_kernels = offload._run_kernels  # noqa: SLF001
        self._open = threading.Semaphore(0)
        monkeypatch.setattr(offload, "_run_kernels", self)

    def __call__(self, *arguments: Any) -> None:  # noqa: ANN401
        assert self._open.acquire(timeout=30)
        self._run_kernels(*arguments)

    def let_through(self, updates: int) -> None:
        self._open.release(updates)


def one_weight(**settings: Any) -> tuple[nn.Linear, ShardedEMA, Tensor]:  # noqa: ANN401
    """A model of one weight that is 0, its averages at decay 0, and the average itself, which nobody waits for."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ShardedEMA(model, **{"decay": HalfLife(0), "store": Offloaded()} | settings)
    return model, ema, ema.state_dict()["tracks"]["default"]["averages"]["weight"]


def start_thread(call: Callable[[], object]) -> threading.Thread:
    """In a thread of its own, after it has had the time to return if nothing keeps it."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(0.3)
    return thread


@pytest.mark.parametrize("max_pending", [1, 3])
def test_averages_lag_by_so_many_updates_and_the_next_one_waits(
    max_pending: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ema, average = one_weight(store=Offloaded(max_pending=max_pending))
    gate = Gate(monkeypatch)
    for step in range(max_pending):
        nn.init.constant_(model.weight, step + 1.0)
        ema.update()
    assert average.item() == 0
    nn.init.constant_(model.weight, 100.0)  # what an update is to see is copied when it returns
    waiting = start_thread(ema.update)
    assert waiting.is_alive()
    gate.let_through(1)
    waiting.join(30)
    assert not waiting.is_alive()
    assert average.item() == 1
    gate.let_through(max_pending)
    assert ema.full_state_dict()["weight"].item() == 100


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "ask",
    [
        ShardedEMA.state_dict,
        ShardedEMA.full_state_dict,
        lambda ema: ema.swapped().__enter__(),
        lambda ema: ema.serving().__enter__(),
        lambda ema: ema.copy_to(nn.Linear(1, 1, bias=False)),
        lambda ema: ema.load_state_dict(ema.state_dict()),
        lambda ema: ema.load_full_state_dict(nn.Linear(1, 1, bias=False).state_dict()),
    ],
    ids=["state_dict", "full_state_dict", "swapped", "serving", "copy_to", "load_state_dict", "load_full_state_dict"],
)
def test_reading_averages_waits_for_pending_updates(
    ask: Callable[[ShardedEMA], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ema, average = one_weight()
    gate = Gate(monkeypatch)
    nn.init.ones_(model.weight)
    ema.update()
    asking = start_thread(lambda: ask(ema))
    assert asking.is_alive()
    assert average.item() == 0
    gate.let_through(1)
    asking.join(30)
    assert not asking.is_alive()


def failing(*_: object) -> None:
    raise MemoryError("no more")


def test_a_failure_is_raised_by_the_next_update_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ema, _ = one_weight()
    with monkeypatch.context() as patch:
        patch.setattr(offload, "_run_kernels", failing)
        ema.update()
        wait_until(lambda: "MemoryError('no more')" in caplog.text)
    match = r"MemoryError\('no more'\).*ShardedEMA.*checkpoint"
    with pytest.raises(RuntimeError, match=match) as caught:
        ema.update()
    assert isinstance(caught.value.__cause__, MemoryError)
    nn.init.ones_(model.weight)
    for call in (ema.update, ema.state_dict, ema.full_state_dict):
        with pytest.raises(RuntimeError, match=match):
            call()


def test_a_failure_is_raised_when_averages_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ema, _ = one_weight(store=Offloaded(max_pending=3))
    monkeypatch.setattr(offload, "_run_kernels", failing)
    ema.update()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"MemoryError\('no more'\)"):
            ema.state_dict()


@pytest.mark.parametrize("max_pending", [1, 2])
@pytest.mark.parametrize("where", ["copying", "submitting"])
def test_an_interrupted_call_does_not_mix_updates(
    where: str, max_pending: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call finishes a job that may be submitted, once; no copy is overwritten that is still to be read."""
    model, ema, average = one_weight(store=Offloaded(max_pending=max_pending))
    seen: list[float] = []
    run_kernels, submit = offload._run_kernels, Worker.submit  # noqa: SLF001

    def slowly(*arguments: Any) -> None:  # noqa: ANN401
        time.sleep(0.1)
        run_kernels(*arguments)
        seen.append(average.item())

    def interrupted(*arguments: Any, **_: object) -> None:  # noqa: ANN401
        if where == "submitting":
            submit(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(offload, "_run_kernels", slowly)
    nn.init.constant_(model.weight, 1.0)
    ema.update()
    nn.init.constant_(model.weight, 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(*((HostBuffer, "fill") if where == "copying" else (Worker, "submit")), interrupted)
        with pytest.raises(KeyboardInterrupt):
            ema.update()
    ema.state_dict()
    expected = [1.0] if where == "copying" else [1.0, 2.0]
    assert seen == expected
    assert ema.steps == len(expected)
    nn.init.constant_(model.weight, 3.0)
    ema.update()
    ema.state_dict()
    assert seen == [*expected, 3.0]


def test_a_failure_does_not_hide_that_buffers_were_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.BatchNorm1d(3)
    ema = ShardedEMA(model, decay=0.5, store=Offloaded())
    with ema.serving():
        pass
    with monkeypatch.context() as patch:
        patch.setattr(offload, "_run_kernels", failing)
        with suppress(RuntimeError):  # of buffers, and parameters may come to know
            ema.update()
        replaced = model.running_mean = torch.full((3,), 4.0)
        with pytest.raises(RuntimeError, match=r"MemoryError\('no more'\)"):
            ema.update()
    with pytest.raises(RuntimeError, match=r"MemoryError\('no more'\)"), ema.serving():
        pass
    assert model.running_mean is replaced


@pytest.mark.world_size(2)
def test_a_failure_is_raised_on_every_rank() -> None:
    _, ema = make_trained("fsdp2", store=Offloaded())
    match = r"rank 1.*MemoryError\('no more'\)"
    if dist.get_rank() == 1:
        offload._run_kernels = failing  # noqa: SLF001  this process ends with the test
        match = r"^(?!.*rank 1).*MemoryError\('no more'\)"
    with suppress(RuntimeError):  # of buffers, and parameters may come to know
        ema.update()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=match):
            ema.full_state_dict()


def test_other_stores_are_refused() -> None:
    with pytest.raises(ValueError, match=r"store.*Offloaded\(.*None.*<class"):
        ShardedEMA(nn.Linear(1, 1), store=Offloaded)  # pyrefly: ignore[bad-argument-type]


@pytest.mark.world_size(2)
def test_updates_after_a_save_in_the_background_do_not_get_into_it(tmp_path: Path) -> None:
    model, ema = make_trained("fsdp2", store=Offloaded())
    expected = ema.full_state_dict()
    checkpoint.save({"ema": ema}, tmp_path, step=3, block=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    for _ in range(5):
        ema.update()
    checkpoint.wait()
    resumed = ShardedEMA(wrap("fsdp2", make_net("fsdp2", seed=1)), decay=0.8, store=Offloaded())
    checkpoint.load({"ema": resumed}, tmp_path)
    full = resumed.full_state_dict()
    for name in full.keys() - {"frozen.weight", "frozen.bias"}:
        assert torch.equal(full[name], expected[name])


SCRIPT = """
import os, sys, time
import torch
from torch import nn
from ema_dist import Offloaded, ShardedEMA
from ema_dist.averages import offload
model = nn.Linear(2, 2)
ema = ShardedEMA(model, store=Offloaded())
moves = offload._run_kernels
"""


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT + script]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_a_process_exits_after_its_last_update() -> None:
    process = run_script("""
def slowly(*arguments):
    time.sleep(0.5)
    moves(*arguments)
    print("moved")
offload._run_kernels = slowly
ema.update()
print("end")
""")
    assert (process.returncode, process.stdout.split(), process.stderr) == (0, ["end", "moved"], "")


def test_a_process_exits_after_a_multithreaded_kernel() -> None:
    """The interpreter starts no threads any more by then."""
    process = run_script("""
def slowly(*arguments):
    time.sleep(0.5)
    moves(*arguments)
    print(average[0, 0].item())
offload._run_kernels = slowly
torch.set_num_threads(2)
model = nn.Linear(1024, 1024)
nn.init.zeros_(model.weight)
ema = ShardedEMA(model, decay=0.5, store=Offloaded(), kernel="compiled")
average = ema.state_dict()["tracks"]["default"]["averages"]["weight"]
nn.init.ones_(model.weight)
ema.update()
""")
    assert (process.returncode, process.stdout.split(), process.stderr) == (0, ["0.5"], "")


def test_a_failure_at_exit_is_logged() -> None:
    process = run_script("""
def failing(*arguments):
    time.sleep(0.5)
    raise MemoryError("no more")
offload._run_kernels = failing
ema.update()
""")
    assert process.returncode == 0
    assert "MemoryError('no more')" in process.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_gets_an_error() -> None:
    process = run_script("""
ema.update()
ema.state_dict()
if not os.fork():
    try:
        ema.update()
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
""")
    assert "store=Offloaded()" in process.stdout


def test_memory_is_averages_plus_pending_copies_of_live_weights() -> None:
    model = nn.Linear(1024, 1024, bias=False).bfloat16()
    for max_pending in (1, 2):
        expected = model.weight.numel() * (4 + 2 * max_pending)
        taken = peak_memory(lambda: ShardedEMA(model, store=Offloaded(max_pending=max_pending)))  # noqa: B023
        assert expected <= taken <= expected + 4 * 2**20  # and what kernels take


def test_max_pending_0_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_pending.*\b1\b.*\b0\b"):
        Offloaded(max_pending=0)


def test_serving_mode_names_the_offloaded_averages() -> None:
    model, _, _ = one_weight()
    layout = Layout(model)
    averages = Track(layout, ["weight"], precision=Precision(), averaged_buffers=())
    averages.parameters = {name: average.to("meta") for name, average in averages.parameters.items()}
    assert Serving(layout, averages).mode == "a copy on the model's device"


def test_the_summary_names_the_store() -> None:
    _, ema, _ = one_weight()
    assert "update_kernel=foreach" in repr(ema)
    assert "Offloaded(pin_memory=True, max_pending=1)" in repr(ema)


def awkward_tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(7, 3),
        torch.randn(()),
        torch.randn(0, 4),
        torch.randn(33, 65).bfloat16(),
        torch.tensor([3, -4]),
        torch.randn(5, 4).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(8, 8)[:, ::2],
        torch.randn(100, 100),
        torch.tensor([True, False]),
        torch.randn(3, dtype=torch.complex64),
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("limit", [64, 1000, 2**20])
def test_copies_on_the_host_equal_their_tensors(
    packed: bool,  # noqa: FBT001
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packed, as they are where they come from a device."""
    monkeypatch.setattr(host_copy, "needs_packing", lambda _: packed)
    monkeypatch.setattr(host_copy, "MAX_PACKED_BYTES", limit)
    values = awkward_tensors()
    copies = HostCopier(values)
    host_buffers = [copies.host_buffer(pinned=False) for _ in range(2)]
    for host_buffer in host_buffers:
        for value in values:
            value.copy_(torch.randint(0, 9, value.shape))
        host_buffer.fill()
        for copied, value in zip(host_buffer.values, values, strict=True):
            assert torch.equal(copied, value)
            assert copied.dtype == value.dtype
            assert copied.stride() == torch.empty_like(value).stride()
    assert not torch.equal(host_buffers[0].values[0], host_buffers[1].values[0])


def test_many_small_tensors_come_in_few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copy, "needs_packing", lambda _: True)
    host_buffer = HostCopier([torch.ones(64, 64) for _ in range(1000)]).host_buffer(pinned=False)
    with torch.profiler.profile() as profile:
        host_buffer.fill(non_blocking={torch.device("cpu")})
    calls = [event.name for event in profile.events() if event.name == "aten::_foreach_copy_"]
    assert len(calls) == 2  # into the scratch, and from there
    scratch = peak_memory(lambda: HostCopier([torch.ones(2**20) for _ in range(32)]))
    assert scratch <= 32 * 4 * 2**20 + host_copy.MAX_PACKED_BYTES


@pytest.mark.world_size(2)
def test_saved_averages_stay_on_the_cpu_for_any_mesh(tmp_path: Path) -> None:
    """`DTensor.from_local` would copy it to the mesh's device. Nothing of a GPU is touched here."""
    full = torch.arange(21.0).view(7, 3)
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cuda")
    rows = distribute_tensor(full, init_device_mesh("cpu", (2,)), [ShardPlacement(0)]).to_local()
    shard = MeshShard(
        ("w",), rows, rows, mesh=mesh, placements=[ShardPlacement(0)], shape=full.shape, stride=full.stride()
    )
    wrapped = shard.wrap(rows)
    assert isinstance(wrapped, DTensor)
    assert wrapped.to_local().data_ptr() == rows.data_ptr()
    assert shard.unwrap(wrapped).data_ptr() == rows.data_ptr()
    dcp.save({"w": wrapped}, checkpoint_id=tmp_path)
    target = shard.wrap(torch.zeros_like(rows))
    dcp.load({"w": target}, checkpoint_id=tmp_path)
    assert torch.equal(target.to_local(), rows)
    other = DeviceMesh.from_group([dist.group.WORLD], "cpu", mesh=torch.tensor([0, 1]), mesh_dim_names=("other",))
    assert (
        shard.unwrap(DTensor.from_local(rows, other, [ShardPlacement(0)], shape=full.shape, stride=full.stride()))
        is not None
    )
    with pytest.raises(ValueError, match=r"\(7, 3\).*cuda.*\(3, 7\).*cpu"):
        shard.unwrap(distribute_tensor(full.t().contiguous(), init_device_mesh("cpu", (2,)), [ShardPlacement(0)]))
