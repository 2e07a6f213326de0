"""Copies through pinned buffers. The device here runs transfers only when the host waits for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_dist.kernels import HostCopier, bus_copy, copy_pairs, copy_to_host
from tests.support.sample_tensors import sample_tensors


class LateDevice:
    """Transfers stay in a queue until the host waits for an event after them: a buffer used too early is noticed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queue: list[Callable[[], object]] = []
        self.transferred: list[torch.dtype] = []
        self.Event = partial(LateEvent, self)
        self._copy = torch._foreach_copy_
        monkeypatch.setattr(torch, "_foreach_copy_", self.foreach_copy)

    def foreach_copy(self, targets: list[Tensor], sources: list[Tensor], *, non_blocking: bool = False) -> None:
        if non_blocking:
            lazy = [source for source in sources if source.is_conj() or source.is_neg()]
            assert not lazy, "torch conjugates their copies on the host, before they have arrived"
            self.transferred.append(min((targets[0].dtype, sources[0].dtype), key=lambda dtype: dtype.itemsize))
            self.queue.append(partial(self._copy, targets, sources))
        else:
            self._copy(targets, sources)


class LateEvent:
    """Has happened once the host waits for it."""

    def __init__(self, device: LateDevice) -> None:
        self._device = device

    def record(self) -> None:
        self._end = len(self._device.queue)

    def record_and_synchronize(self) -> None:
        self.record()
        self.synchronize()

    def synchronize(self) -> None:
        queue = self._device.queue
        for index in range(self._end):
            queue[index]()
            queue[index] = lambda: None


@pytest.mark.parametrize("direction", ["_to_host", "_to_device"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffer_bytes", [64, 256, 2**20])
def test_no_buffer_is_used_before_its_transfer_is_done(
    direction: str, source: torch.dtype, target: torch.dtype, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Casts to the narrower dtype come before the transfer; values are those of a plain copy."""
    monkeypatch.setattr(bus_copy, "STAGING_BYTES", buffer_bytes)
    sources = sample_tensors(source)
    targets = [torch.full_like(tensor, torch.nan, dtype=target) for tensor in sources]
    device: Any = LateDevice(monkeypatch)
    staging = bus_copy._Staging.allocate(targets, sources, device, pinned=False)  # noqa: SLF001
    getattr(bus_copy, direction)(targets, sources, staging)
    assert all(map(torch.equal, targets, [tensor.to(target) for tensor in sources]))
    assert {*device.transferred} == {min(target, source, key=lambda dtype: dtype.itemsize)}
    assert sum(buffer.nbytes for buffer in staging.buffers) <= 2 * buffer_bytes


def test_lazily_conjugated_weights_are_resolved_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(5, dtype=torch.complex64)
    sources = [weight.conj(), weight.conj().imag]
    for source in sources:
        device: Any = LateDevice(monkeypatch)
        target = torch.empty_like(source).resolve_conj().resolve_neg()
        staging = bus_copy._Staging.allocate([target], [source], device, pinned=False)  # noqa: SLF001
        bus_copy._to_host([target], [source], staging)  # noqa: SLF001
        host_buffer = HostCopier([source]).host_buffer(pinned=False)
        host_buffer.fill(non_blocking={source.device})
        LateEvent(device).record_and_synchronize()
        assert torch.equal(target, source)
        assert torch.equal(host_buffer.values[0], source)


def test_only_copies_between_the_host_and_a_gpu_are_staged() -> None:
    cpu, first, second = (torch.device(name) for name in ("cpu", "cuda:0", "cuda:1"))
    assert bus_copy._pinnable_device(cpu, second) == second  # noqa: SLF001
    assert bus_copy._pinnable_device(first, cpu) == first  # noqa: SLF001
    assert [bus_copy._pinnable_device(*pair) for pair in ((cpu, cpu), (first, second))] == [None, None]  # noqa: SLF001


def test_a_gpu_gets_two_pinned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its index: the buffers, events and transfers are those of the tensors' device."""
    entered: list[torch.device] = []
    device: Any = LateDevice(monkeypatch)
    device.device = lambda index: nullcontext(entered.append(index))
    pinned: list[bool] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr(bus_copy, "_pinnable_device", lambda *_: torch.device("cuda", 1))

    def recording_empty(*sizes: int, pin_memory: bool, **options: Any) -> Tensor:  # noqa: ANN401
        pinned.append(pin_memory)
        return empty(*sizes, **options)

    value, copied = torch.randn(2**18), torch.zeros(2**18)
    monkeypatch.setattr(torch, "empty", recording_empty)
    copy_pairs([(copied, value)])
    assert torch.equal(copied, value)
    assert (entered, pinned) == ([torch.device("cuda", 1)], [True, True])


def test_without_memory_to_pin_torch_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    device: Any = LateDevice(monkeypatch)
    device.device = lambda _: nullcontext()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr(bus_copy, "_pinnable_device", lambda *_: torch.device("cuda", 1))
    monkeypatch.setattr(torch, "empty", fail)
    value, copied = torch.randn(2**18), torch.zeros(2**18)
    copy_pairs([(copied, value)])
    assert torch.equal(copied, value)
    assert not device.transferred


def test_copies_keep_strides_and_groups() -> None:
    for tensor in sample_tensors(torch.float32):
        copied = copy_to_host(tensor)
        assert torch.equal(copied, tensor)
        assert copied.stride() == torch.empty_like(tensor).stride()
    mixed = [
        (torch.zeros(3, dtype=target), torch.rand(3).to(source))
        for target, source in [
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
        ]
    ]
    copy_pairs(mixed)
    assert all(torch.equal(target, source.to(target.dtype)) for target, source in mixed)


@pytest.mark.gpu
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_on_the_gpu_copies_are_those_of_torch(source: torch.dtype, target: torch.dtype) -> None:
    """Of more than two buffers, in both directions, with strides."""
    values = [torch.randn(2**25 + 3), torch.randn(3000, 5000).t(), *sample_tensors(torch.float32)]
    on_device = [value.to("cuda", source) for value in values]
    on_host = [torch.empty_like(value, dtype=target) for value in values]
    copy_pairs(zip(on_host, on_device, strict=True))
    assert all(map(torch.equal, on_host, [value.cpu().to(target) for value in on_device]))
    back = [torch.empty_like(value) for value in on_device]
    copy_pairs(zip(back, on_host, strict=True))
    torch.cuda.synchronize()
    assert all(map(torch.equal, [value.cpu() for value in back], [value.to(source) for value in on_host]))
