"""Lerps compared with float64, swaps and checksums of plain lists."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_dist.kernels import Exchange, checksum, group_pairs, lerp_, scratch, scratch_kernel
from tests.support.layouts import peak_memory

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
SHAPES = [(), (0, 3), (7, 5), (1, 2, 3)]


def is_supported(average: torch.dtype, live: torch.dtype) -> bool:
    """Averages are complex exactly if the weights are."""
    return average.is_complex == live.is_complex


def tensors(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize(("average", "live"), [pair for pair in product(DTYPES, repeat=2) if is_supported(*pair)])
@pytest.mark.parametrize("weight", [0.0, 0.125, 0.75, 1.0])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("finite", [False, True])
def test_lerp_equals_the_float64_reference(
    average: torch.dtype,
    live: torch.dtype,
    weight: float,
    on_device: bool,  # noqa: FBT001
    finite: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For every pair of dtypes, a weight on the host or on the device, and either ``finite``; in small chunks."""
    monkeypatch.setattr(scratch, "CPU_SCRATCH_BYTES", 64)
    averages, values = tensors(average), tensors(live)
    wide = torch.complex128 if average.is_complex else torch.float64
    expected = [a.to(wide) * (1 - weight) + v.to(wide) * weight for a, v in zip(averages, values, strict=True)]
    lerp_(averages, values, torch.tensor(weight, dtype=torch.float64) if on_device else weight, finite=finite)
    eps = 4 * torch.finfo(average).eps
    for actual, reference in zip(averages, expected, strict=True):
        assert actual.dtype == average
        torch.testing.assert_close(actual.to(wide), reference, rtol=eps, atol=eps)


def test_a_step_skipped_on_the_device_ignores_infinities() -> None:
    """Zero times infinity is NaN."""
    averages, values = [torch.ones(3)], [torch.tensor([1.0, float("inf"), float("nan")])]
    lerp_(averages, values, torch.tensor(0.0), finite=False)
    assert torch.equal(averages[0], torch.ones(3))


def test_weights_of_zero_and_one_are_exact() -> None:
    """Also on the device: a weight of 0 skips a step, and a weight of 1 copies the live values."""
    for dtype in (torch.float32, torch.bfloat16):
        averages, values = tensors(dtype), tensors(dtype)
        before = [average.clone() for average in averages]
        lerp_(averages, values, torch.tensor(0.0))
        assert all(torch.equal(a, b) for a, b in zip(averages, before, strict=True))
        lerp_(averages, values, torch.tensor(1.0))
        assert all(torch.equal(a, v) for a, v in zip(averages, values, strict=True))


def test_swap_is_exact_and_its_own_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "CPU_SCRATCH_BYTES", 100)
    left = [torch.randn(40, 3), torch.tensor([float("nan"), -0.0, float("inf")]), torch.arange(30), torch.zeros(0)]
    right = [torch.randn(3, 40).t(), torch.zeros(3), torch.zeros(30, dtype=torch.int64), torch.zeros(0)]
    before = [tensor.view(torch.uint8 if tensor.numel() == 0 else torch.int32).clone() for tensor in left + right]
    exchange = Exchange(group_pairs(zip(left, right, strict=True)))
    exchange.run()
    assert all(torch.equal(t.view(b.dtype), b) for t, b in zip(right + left, before, strict=True))
    exchange.run_back()
    assert all(torch.equal(t.view(b.dtype), b) for t, b in zip(left + right, before, strict=True))


@pytest.mark.parametrize("available", [4096, 0])
def test_a_swap_with_little_memory_is_exact_and_one_without_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, available: int
) -> None:
    """A smaller scratch does on the way back, too, where chunks are exchanged already."""
    left, right = [torch.arange(9000.0), torch.arange(2000)], [torch.zeros(9000), torch.ones(2000, dtype=torch.int64)]
    before = [tensor.clone() for tensor in left + right]
    exchange = Exchange(group_pairs(zip(left, right, strict=True)))
    empty = torch.empty

    def limited_empty(nbytes: int, **settings: Any) -> Tensor:  # noqa: ANN401
        if nbytes > available:
            raise torch.OutOfMemoryError
        return empty(nbytes, **settings)

    if available:
        exchange.run()
    monkeypatch.setattr(scratch.torch, "empty", limited_empty)
    if available:
        assert all(torch.equal(t, b) for t, b in zip(right + left, before, strict=True))
        exchange.run_back()
    else:
        with pytest.raises(torch.OutOfMemoryError):
            exchange.run()
    assert all(torch.equal(t, b) for t, b in zip(left + right, before, strict=True))


def test_exchanging_several_dtypes_takes_one_scratch() -> None:
    left = [torch.zeros(2**19, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    exchange = Exchange(group_pairs((tensor, tensor.clone()) for tensor in left))
    assert peak_memory(exchange.run) <= scratch.CPU_SCRATCH_BYTES


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_checksums_detect_changed_and_swapped_elements(dtype: torch.dtype) -> None:
    tensor = torch.ones(9).to(dtype)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    tensor[4] = 0
    changed = checksum(tensor)
    assert changed != before
    tensor[4], tensor[5] = 1, 0
    assert checksum(tensor) not in (before, changed), "a plain sum would be equal after a swap of two elements"


def test_small_weights_are_converted_together_within_the_scratch_limit() -> None:
    """Converting each by itself would take one call for each."""
    values = [torch.ones(64, 64, dtype=torch.bfloat16) for _ in range(300)]
    averages = [torch.zeros(64, 64) for _ in values]
    lerp = scratch_kernel.ScratchKernel([averages], values)
    with torch.profiler.profile() as profiled:
        lerp([0.5])
    counts = {event.key: event.count for event in profiled.key_averages()}
    assert 1 < counts["aten::copy_"] == counts["aten::cat"] < 10
    assert all(torch.equal(average, torch.full((64, 64), 0.5)) for average in averages)
    assert peak_memory(lambda: scratch_kernel.ScratchKernel([averages], values)) <= scratch.CPU_SCRATCH_BYTES
