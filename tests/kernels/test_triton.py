"""The Triton kernel: interpreted where there is no GPU, compiled where there is one."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ema_dist import kernels
from ema_dist.kernels import CompensatedRounding, StochasticRounding, TensorOffset, make_kernel, recombine, split_hi_lo
from ema_dist.kernels.triton_kernel import BLOCK, PIECE
from tests.support import ROOT
from tests.support.sample_tensors import assert_close, expected_average, sample_tensors

BF16, I16 = torch.bfloat16, torch.int16
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@needs_triton
def test_the_interpreted_kernel_passes_the_tests_of_all_kernels() -> None:
    """In a separate process, because Triton reads TRITON_INTERPRET once."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "triton",
        "tests/kernels/test_all_kernels.py",
        "tests/kernels/test_low_precision.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@needs_triton
def test_on_the_cpu_it_falls_back_with_a_warning() -> None:
    """Without a GPU, Triton can only be interpreted."""
    averages, values = [torch.zeros(3)], [torch.ones(3, dtype=torch.bfloat16)]
    with pytest.warns(UserWarning, match=r"kernel='triton'.*'scratch'.*\bGPU\b.*TRITON_INTERPRET=1"):
        lerp = make_kernel([averages], values, kernel="triton")
    assert lerp.name == "scratch"
    lerp([0.5])
    assert torch.equal(averages[0], torch.full((3,), 0.5))


def test_without_triton_it_falls_back_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ema_dist.kernels.triton_jit", None)
    monkeypatch.delattr(kernels, "triton_jit", raising=False)
    with pytest.warns(UserWarning, match="kernel='triton'.*'foreach'.*pip install triton"):
        lerp = make_kernel([[torch.zeros(3)]], [torch.ones(3)], kernel="triton")
    assert lerp.name == "foreach"


@pytest.mark.parametrize("error", [RuntimeError("no driver"), ImportError("undefined symbol"), AttributeError("jit")])
def test_with_a_broken_triton_it_falls_back_with_a_warning(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "triton":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "triton" or name.endswith("triton_jit")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(kernels, "triton_jit", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.warns(UserWarning, match=f"kernel='triton'.*'foreach'.*{error}"):
        lerp = make_kernel([[torch.zeros(3)]], [torch.ones(3)], kernel="triton")
    assert lerp.name == "foreach"


def compile_for(capability: int, live: str, stored: str, rounding: str, tracks: int) -> Any:  # noqa: ANN401
    """The kernel compiled for a GPU of this compute capability, which is not needed for it."""
    from triton import compile  # noqa: A004, PLC0415 - optional
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from ema_dist.kernels import triton_jit  # noqa: PLC0415

    tl, kernel = triton_jit.tl, triton_jit.lerp_tracks
    dtypes = {"live": getattr(tl, live), "stored": getattr(tl, stored), "wide": tl.float32}
    settings = {**dtypes, "track_count": tracks, "finite": True, "rounding": getattr(triton_jit, rounding).value}
    settings |= {"aligned": True, "block": BLOCK, "piece": PIECE}
    types = ["*i64"] * 3 + ["*i32", "*i64"] + ["*i32"] * 3 + ["*fp64", "*i32", "i32"] + ["constexpr"] * len(settings)
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), settings)
    try:
        return compile(source, target=GPUTarget("cuda", capability, 32))
    except RuntimeError as error:
        if "is not defined for option 'gpu-name'" not in str(error):
            raise
        pytest.skip(f"this version of Triton does not know sm_{capability}")


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("live", "stored", "rounding", "tracks"),
    [
        ("float32", "float32", "NEAREST", 1),
        ("bfloat16", "float32", "NEAREST", 1),
        ("bfloat16", "float32", "NEAREST", 4),
        ("bfloat16", "uint16", "STOCHASTIC", 4),
        ("bfloat16", "uint16", "COMPENSATED", 4),
    ],
)
def test_it_compiles_for_a_gpu_into_few_registers_and_reads_16_bytes_at_a_time(
    capability: int, live: str, stored: str, rounding: str, tracks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With 96 registers a thread, five programs run on a processor at a time; with all 255, two."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_for(capability, live, stored, rounding, tracks)
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert "st.global.v4.b32" in compiled.asm["ptx"]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    import triton.backends.nvidia  # noqa: PLC0415

    command = [Path(triton.backends.nvidia.__file__).with_name("bin") / "cuobjdump", "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(re.findall(rf"\b{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    assert registers <= 96
    assert spilled == 0


def on_the_gpu(dtype: torch.dtype, count: int = 1) -> list[list[Tensor]]:
    """Odd shapes, one of more than a block, and one at an odd address."""
    odd = [torch.randn(BLOCK + 1).to("cuda", dtype)[1:] for _ in range(count)]
    large = [torch.randn(3 * BLOCK + 5).to("cuda", dtype) for _ in range(count)]
    return [[*(t.cuda() for t in sample_tensors(dtype)), odd[index], large[index]] for index in range(count)]


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
        [expected_average(a, v, weight) for a, v in zip(track, values, strict=True)]
        for track, weight in zip(tracks, weights, strict=True)
    ]
    lerp = make_kernel(tracks, values, finite=finite, kernel="triton")
    assert lerp.name == "triton"
    lerp(weights)
    for track, reference in zip(tracks, expected, strict=True):
        assert_close(track, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["scratch", "triton"])
def test_on_the_gpu_averages_are_rounded_as_on_the_cpu(kernel: str) -> None:
    """With the same random bits and residuals, if the arithmetic is exact."""
    (values,) = on_the_gpu(torch.float32)
    tensor_offsets = [TensorOffset(index, 7) for index in range(len(values))]
    rounded, high, low = [[torch.zeros_like(value, dtype=dtype) for value in values] for dtype in (BF16, BF16, I16)]
    make_kernel([rounded], values, kernel=kernel, rounding=StochasticRounding(tensor_offsets, 3))([1.0], 5)
    make_kernel([high], values, kernel=kernel, rounding=CompensatedRounding([low]))([1.0])
    expected = [torch.zeros_like(average.cpu()) for average in rounded]
    make_kernel(
        [expected], [value.cpu() for value in values], kernel="scratch", rounding=StochasticRounding(tensor_offsets, 3)
    )([1.0], 5)
    assert all(torch.equal(average.cpu(), reference) for average, reference in zip(rounded, expected, strict=True))
    assert all(torch.equal(recombine(*parts), value) for *parts, value in zip(high, low, values, strict=True))


@pytest.mark.gpu
def test_an_update_is_captured_in_a_cuda_graph() -> None:
    """Its weights are read from the device, so that replays use a changing decay."""
    averages, values = [torch.randn(3 * BLOCK + 5, device="cuda")], [torch.randn(3 * BLOCK + 5, device="cuda").to(BF16)]
    expected = [average.double() for average in averages]
    weight = torch.zeros((), device="cuda")
    lerp = make_kernel([averages], values, kernel="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lerp([weight])
    for step in (0.5, 0.0, 0.25, 1.0):
        weight.fill_(step)
        for value in values:
            value.add_(1)
        graph.replay()
        expected = [expected_average(average, value, step) for average, value in zip(expected, values, strict=True)]
    assert_close(averages, expected)


@pytest.mark.gpu
def test_an_update_does_not_wait_for_the_gpu() -> None:
    (averages,), (values,) = on_the_gpu(torch.float32), on_the_gpu(torch.bfloat16)
    lerp = make_kernel([averages], values, kernel="triton")
    weight = torch.tensor(0.5, device="cuda")  # this copy waits for the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        lerp([0.5])
        lerp([weight])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["scratch", "triton"])
def test_on_the_gpu_compensated_averages_equal_float32_averages(kernel: str) -> None:
    """Over many updates, with weights that round."""
    (values,), (averages,) = on_the_gpu(BF16), on_the_gpu(torch.float32)
    high, low = (list(column) for column in zip(*map(split_hi_lo, averages), strict=True))
    lerp = make_kernel([averages], values, kernel=kernel)
    lerp_parts = make_kernel([high], values, kernel=kernel, rounding=CompensatedRounding([low]))
    for step in range(40):
        for value in values:
            value.add_(0.01)
        weight = (0.001, 0.3, 0.9999, 0.5)[step % 4]
        lerp([weight])
        lerp_parts([weight])
    assert all(torch.equal(recombine(*parts), average) for *parts, average in zip(high, low, averages, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["scratch", "triton"])
def test_on_the_gpu_random_bits_are_those_of_the_cpu_for_large_offsets(kernel: str) -> None:
    """With weights of 1 the arithmetic is exact: only the random bits decide."""
    (values,) = on_the_gpu(torch.float32)
    rounding = StochasticRounding([TensorOffset(2**31 + 3 * index, 2**33 + 5) for index in range(len(values))], 2**40)
    averages = [torch.zeros_like(value, dtype=BF16) for value in values]
    expected = [average.cpu() for average in averages]
    lerp = make_kernel([averages], values, kernel=kernel, rounding=rounding)
    lerp_on_cpu = make_kernel([expected], [value.cpu() for value in values], kernel="scratch", rounding=rounding)
    for update_index in (0, 1, 2**31 - 1):
        lerp([1.0], update_index)
        lerp_on_cpu([1.0], update_index)
        assert all(torch.equal(average.cpu(), on_cpu) for average, on_cpu in zip(averages, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["foreach", "scratch", "triton"])
def test_on_the_gpu_a_tensor_may_have_more_elements_than_32_bits_count(kernel: str) -> None:
    numel = 2**31 + BLOCK + 3
    if torch.cuda.mem_get_info()[0] < 9 * numel:
        pytest.skip("needs 18 GiB of a GPU")
    value = torch.ones(numel, dtype=torch.float32 if kernel == "foreach" else BF16, device="cuda")
    average = torch.zeros(numel, device="cuda")
    lerp = make_kernel([[average]], [value], kernel=kernel)
    assert lerp.name == kernel
    lerp([0.25])
    assert bool((average == 0.25).all())
