"""Several tracks at once, with every kernel, compared with float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ema_dist.kernels import lerp_tracks_, make_kernel, scratch, triton_kernel
from tests.support.sample_tensors import IS_INTERPRETED, assert_close, expected_average, sample_tensors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KERNELS_HERE = ["triton"] if IS_INTERPRETED else [None, "foreach", "scratch", "compiled"]
WEIGHTS = [0.125, 0.75, 1.0, 0.0]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split small tensors, too."""
    monkeypatch.setattr(scratch, "CPU_SCRATCH_BYTES", 256)
    monkeypatch.setattr(triton_kernel, "BLOCK", 64)
    monkeypatch.setattr(triton_kernel, "PIECE", 32)


@pytest.mark.parametrize(
    ("kernel", "average", "live"),
    [case for case in product(KERNELS_HERE, DTYPES, DTYPES) if case[0] != "foreach" or case[1] == case[2]],
)
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("finite", [False, True])
def test_each_track_equals_the_float64_reference(
    kernel: str | None,
    average: torch.dtype,
    live: torch.dtype,
    count: int,
    on_device: bool,  # noqa: FBT001
    finite: bool,  # noqa: FBT001
) -> None:
    """For every pair of dtypes, weights on the host and on the device, 0 and 1 included, and either ``finite``."""
    tracks, values = [sample_tensors(average) for _ in range(count)], sample_tensors(live)
    before = [value.clone() for value in values]
    lerp = make_kernel(tracks, values, finite=finite, kernel=kernel)
    assert kernel in (None, lerp.name)
    for weights in (WEIGHTS[:count], WEIGHTS[-count:]):
        expected = [
            [expected_average(a, v, weight) for a, v in zip(track, values, strict=True)]
            for track, weight in zip(tracks, weights, strict=True)
        ]
        lerp([torch.tensor(weight) if on_device else weight for weight in weights])
        for track, reference in zip(tracks, expected, strict=True):
            assert_close(track, reference)
    assert all(map(torch.equal, values, before))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, which interprets Triton
@pytest.mark.parametrize("kernel", KERNELS_HERE)
@pytest.mark.parametrize("on_device", [False, True])
def test_weights_of_zero_and_one_are_exact(kernel: str | None, on_device: bool) -> None:  # noqa: FBT001
    """A weight of 0 ignores infinities and NaN, and a weight of 1 copies them."""
    averages, values = [torch.full((6,), 2.0)] * 2, [torch.tensor([1.0, -0.0, 1e-45, torch.inf, -torch.inf, torch.nan])]
    tracks = [[averages[0].clone()], [averages[1].clone()]]
    lerp = make_kernel(tracks, values, finite=False, kernel=kernel)
    lerp([torch.tensor(weight) if on_device else weight for weight in (0.0, 1.0)])
    assert torch.equal(tracks[0][0], averages[0])
    assert torch.equal(tracks[1][0].view(torch.int32), values[0].view(torch.int32))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, which interprets Triton
@pytest.mark.parametrize("kernel", KERNELS_HERE)
@pytest.mark.parametrize("weight", [0.25, 0.75])
def test_nonfinite_averages_take_the_value(kernel: str | None, weight: float) -> None:
    """Equal infinities remain, and an average that was infinite can become finite again."""
    inf, nan = torch.inf, torch.nan
    average, value = torch.tensor([inf, -inf, inf, 0.0, nan, 1.0]), torch.tensor([inf, -inf, 1.0, inf, 2.0, nan])
    make_kernel([[average]], [value], finite=False, kernel=kernel)([weight])
    torch.testing.assert_close(average, value, rtol=0, atol=0, equal_nan=True)


def test_tracks_may_differ_in_dtype() -> None:
    """Live values are converted to the dtype of each track."""
    tracks, values = [sample_tensors(dtype) for dtype in DTYPES], sample_tensors(torch.bfloat16)
    expected = [[expected_average(a, v, 0.25) for a, v in zip(track, values, strict=True)] for track in tracks]
    lerp_tracks_(tracks, values, [0.25] * len(tracks))
    for track, reference in zip(tracks, expected, strict=True):
        assert_close(track, reference)


def test_several_tracks_are_bit_identical_to_single_ones() -> None:
    """The results of a track do not depend on other tracks."""
    tracks, values = [sample_tensors(torch.float32) for _ in range(3)], sample_tensors(torch.bfloat16)
    alone = [[average.clone() for average in track] for track in tracks]
    weights = [0.1, torch.tensor(0.3), 1.0]
    lerp_tracks_(tracks, values, weights)
    for track, weight in zip(alone, weights, strict=True):
        lerp_tracks_([track], values, [weight])
    assert all(torch.equal(a, b) for pair in zip(tracks, alone, strict=True) for a, b in zip(*pair, strict=True))


def test_one_weight_per_track_is_required() -> None:
    with pytest.raises(ValueError, match=r"weight.*\b2 tracks.*\b1\b"):
        lerp_tracks_([[torch.ones(1)]] * 2, [torch.ones(1)], [0.5])


def test_empty_lists_are_accepted() -> None:
    lerp_tracks_([[], []], [], [0.5, 0.5])
    lerp_tracks_([], [torch.ones(1)], [])


@pytest.mark.parametrize("kernel", KERNELS_HERE)
def test_autograd_detects_updates_of_averages(kernel: str | None) -> None:
    """A graph that holds averages would run backward with values other than those of its forward pass."""
    averages, inputs = [torch.ones(5), torch.ones(2, 3)], torch.ones(5, requires_grad=True)
    lerp = make_kernel([averages], [torch.zeros(5), torch.zeros(2, 3)], kernel=kernel)
    output = (inputs * averages[0]).sum()
    lerp([0.5])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.mark.skipif(IS_INTERPRETED, reason="Triton does not support shared memory")
@pytest.mark.parametrize("kernel", KERNELS_HERE)
def test_averages_may_move_into_shared_memory(kernel: str | None) -> None:
    """Sending averages to another process moves them there."""
    averages = [torch.zeros(50_000), torch.zeros(7, 5)]
    lerp = make_kernel([averages], [torch.ones(50_000), torch.ones(7, 5)], kernel=kernel)
    lerp([0.5])
    for average in averages:
        average.share_memory_()
    lerp([0.5])
    assert all(torch.equal(average, torch.full_like(average, 0.75)) for average in averages)


@pytest.mark.skipif(not IS_INTERPRETED, reason="needs a Triton that runs")
def test_triton_compile_errors_fall_back_to_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_kernel.TritonKernel, "_run", fail)
    with pytest.warns(UserWarning, match="kernel='triton'.*'scratch'.*Failed to find C compiler"):
        lerp = make_kernel([[torch.zeros(3)]], [torch.ones(3).bfloat16()], kernel="triton")
    assert lerp.name == "scratch"
