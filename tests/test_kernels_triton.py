"""The Triton kernel: interpreted where there is no GPU, compiled where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ema_dist import kernels
from ema_dist.kernels import bind
from ema_dist.kernels.one_launch import BLOCK
from kernel_lists import assert_close, followed, tensors

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@needs_triton
def test_the_interpreted_kernel_passes_the_tests_of_all_kernels() -> None:
    """In a process of its own, as Triton looks once whether it shall interpret."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_kernels_follow.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@needs_triton
def test_on_the_cpu_another_kernel_serves_and_says_so() -> None:
    """Unless it is interpreted, which the interpreter must have been told before."""
    averages, values = [torch.zeros(3)], [torch.ones(3, dtype=torch.bfloat16)]
    with pytest.warns(UserWarning, match=r"kernel='triton' cannot .* 'scratch' does: Triton needs a GPU"):
        follow = bind([averages], values, kernel="triton")
    assert follow.name == "scratch"
    follow([0.5])
    assert torch.equal(averages[0], torch.full((3,), 0.5))


def test_without_triton_another_kernel_serves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ema_dist.kernels.triton_code", None)
    monkeypatch.delattr(kernels, "triton_code", raising=False)
    with pytest.warns(UserWarning, match="'foreach' does: Triton is missing: pip install triton"):
        follow = bind([[torch.zeros(3)]], [torch.ones(3)], kernel="triton")
    assert follow.name == "foreach"


def on_the_gpu(dtype: torch.dtype, count: int = 1) -> list[list[Tensor]]:
    """Odd shapes, one of more than a block, and one at an odd address."""
    odd = [torch.randn(BLOCK + 1).to("cuda", dtype)[1:] for _ in range(count)]
    large = [torch.randn(3 * BLOCK + 5).to("cuda", dtype) for _ in range(count)]
    return [[*(t.cuda() for t in tensors(dtype)), odd[index], large[index]] for index in range(count)]


@pytest.mark.gpu
@pytest.mark.parametrize("average", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("finite", [False, True])
def test_on_the_gpu_each_track_equals_the_float64_reference(
    average: torch.dtype,
    live: torch.dtype,
    finite: bool,  # noqa: FBT001
) -> None:
    tracks, (values,) = on_the_gpu(average, 3), on_the_gpu(live)
    weights = [0.125, 1.0, 0.0]
    expected = [
        [followed(a, v, weight) for a, v in zip(track, values, strict=True)]
        for track, weight in zip(tracks, weights, strict=True)
    ]
    follow = bind(tracks, values, finite=finite, kernel="triton")
    assert follow.name == "triton"
    follow(weights)
    for track, reference in zip(tracks, expected, strict=True):
        assert_close(track, reference)


@pytest.mark.gpu
def test_an_update_is_captured_in_a_cuda_graph() -> None:
    """Its weights come from the device, so that replays follow a changing decay."""
    (averages,), (values,) = on_the_gpu(torch.float32), on_the_gpu(torch.bfloat16)
    expected = [average.double() for average in averages]
    weight = torch.zeros((), device="cuda")
    follow = bind([averages], values, kernel="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        follow([weight])
    for step in (0.5, 0.0, 0.25, 1.0):
        weight.fill_(step)
        for value in values:
            value.add_(1)
        graph.replay()
        expected = [followed(average, value, step) for average, value in zip(expected, values, strict=True)]
    assert_close(averages, expected)


@pytest.mark.gpu
def test_an_update_does_not_wait_for_the_gpu() -> None:
    (averages,), (values,) = on_the_gpu(torch.float32), on_the_gpu(torch.bfloat16)
    follow = bind([averages], values, kernel="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        follow([0.5])
        follow([torch.tensor(0.5, device="cuda")])
    finally:
        torch.cuda.set_sync_debug_mode("default")
