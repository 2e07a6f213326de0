"""The kernel that the C compiler builds: it agrees with torch, and without a compiler another kernel replaces it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ema_dist.kernels import c_kernel, lerp_tracks_, make_kernel
from tests.support.sample_tensors import sample_tensors

F32, F64 = torch.float32, torch.float64
WEIGHTS = [1e-4, 0.3, 0.5, 0.9, 0.0, 1.0]


@pytest.fixture(autouse=True)
def clear_compiled_kernels() -> None:
    """Compile in each test."""
    c_kernel._compile.cache_clear()  # noqa: SLF001


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch rounds twice on this processor")
@pytest.mark.parametrize(("average", "live"), [(F32, F32), (F32, torch.bfloat16), (F32, torch.float16), (F64, F64)])
@pytest.mark.parametrize("finite", [False, True])
def test_averages_are_bit_identical_to_torch(
    average: torch.dtype,
    live: torch.dtype,
    finite: bool,  # noqa: FBT001
) -> None:
    """So runs and replicas may use different kernels."""
    tracks, values = [sample_tensors(average) for _ in WEIGHTS], sample_tensors(live)
    expected = [[tensor.clone() for tensor in track] for track in tracks]
    make_kernel(tracks, values, finite=finite, kernel="compiled")(WEIGHTS)
    lerp_tracks_(expected, values, WEIGHTS, finite=finite)
    for track, reference in zip(tracks, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(track, reference, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_work_is_divided_among_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(c_kernel, "MIN_THREAD_ELEMENTS", 1)
    monkeypatch.setattr(c_kernel, "BLOCK", 16)
    averages = [torch.zeros(size) for size in (5, 3 * 16 + 1, 1, 16)]
    make_kernel([averages], [torch.ones_like(average) for average in averages], kernel="compiled")([0.25])
    assert all((average == 0.25).all() for average in averages)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("", r"C compiler.*\bgcc\b.*\bclang\b.*\bCC\b"), ("/bin/false", "/bin/false")],
)
def test_without_a_compiler_it_falls_back_with_a_warning(
    compiler: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(os.environ, "CC", compiler)
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    averages, values = [torch.zeros(3)], [torch.ones(3, dtype=torch.bfloat16)]
    with pytest.warns(UserWarning, match=f"kernel='compiled'.*'scratch'.*{message}"):
        lerp = make_kernel([averages], values, kernel="compiled")
    assert lerp.name == "scratch"
    lerp([0.5])
    assert torch.equal(averages[0], torch.full((3,), 0.5))


def test_other_dtypes_and_devices_fall_back_to_another_kernel() -> None:
    with pytest.warns(UserWarning, match=r"kernel='compiled'.*'foreach'.*torch\.complex64.*\bcpu\b"):
        lerp = make_kernel(
            [[torch.zeros(3, dtype=torch.complex64)]], [torch.ones(3, dtype=torch.complex64)], kernel="compiled"
        )
    assert lerp.name == "foreach"
