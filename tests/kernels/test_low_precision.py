"""bfloat16 averages as accurate as float32: with stochastic rounding, or with residuals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ema_dist.kernels import (
    CompensatedRounding,
    StochasticRounding,
    TensorOffset,
    lerp_,
    make_kernel,
    recombine,
    scratch,
    split_hi_lo,
    triton_kernel,
)
from ema_dist.kernels.random_bits import hash_int, mix32, to_int32, track_key
from tests.support.sample_tensors import IS_INTERPRETED, SHAPES, sample_tensors, with_strides_of

UPDATES = 20_000
WEIGHT = 1e-4  # decay 0.9999
KERNELS_HERE = ["triton"] if IS_INTERPRETED else ["scratch", "compiled"]
LIVE = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=[256, 2 * 2**20], ids=["small chunks", "one chunk"])
def chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of chunks must not matter."""
    monkeypatch.setattr(triton_kernel, "BLOCK", 64)
    monkeypatch.setattr(triton_kernel, "PIECE", 32)
    monkeypatch.setattr(scratch, "CPU_SCRATCH_BYTES", request.param)


def bits_of(tensor: Tensor) -> Tensor:
    """The bits as integers."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def wide_samples() -> Tensor:
    """Every upper half of a float32 with some lower halves: zeros, subnormals, infinities and NaN of both signs."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32).bitwise_left_shift(16)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (upper[:, None] + lower).view(torch.float32)


def test_the_hi_lo_split_round_trips_exactly() -> None:
    wide = wide_samples()
    before = wide.clone()
    high, low = split_hi_lo(wide)
    assert torch.equal(bits_of(wide), bits_of(before)), "the input must not change"
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    recombined = recombine(high, low)
    numbers = ~wide.isnan()
    assert torch.equal(bits_of(recombined[numbers]), bits_of(wide[numbers]))
    assert recombined[~numbers].isnan().all()
    assert high[~numbers].isnan().all(), "the model must show that training failed"


def test_hi_is_the_nearest_bfloat16() -> None:
    """The model gets this part; only ties may be rounded differently from torch."""
    wide = wide_samples()
    wide = wide[wide.isfinite()]
    high, _ = split_hi_lo(wide)
    nearest = wide.bfloat16()
    tie = bits_of(wide).bitwise_and(0xFFFF) == 0x8000
    assert torch.equal(bits_of(high[~tie]), bits_of(nearest[~tie]))
    assert torch.equal(
        (high[tie].double() - wide[tie].double()).abs(), (nearest[tie].double() - wide[tie].double()).abs()
    )


@pytest.mark.parametrize("kernel", KERNELS_HERE)
@pytest.mark.usefixtures("chunk_size")
@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("finite", [False, True])
def test_compensated_tracks_are_bit_identical_to_float32(kernel: str, live: torch.dtype, finite: bool) -> None:  # noqa: FBT001
    """With weights on the host and on the device, 0 and 1 included."""
    wide, values = [sample_tensors(torch.float32) for _ in range(3)], sample_tensors(live)
    parts = [[split_hi_lo(average) for average in track] for track in wide]
    highs, lows = [[[pair[part] for pair in track] for track in parts] for part in (0, 1)]
    lerp = make_kernel(highs, values, finite=finite, kernel=kernel, rounding=CompensatedRounding(lows))
    reference = make_kernel(wide, values, finite=finite, kernel=kernel)
    assert lerp.name == kernel
    for weights in ([0.1, 0.7, 1.0], [0.0, torch.tensor(0.25), 1e-4], [torch.tensor(0.0), torch.tensor(1.0), 0.9]):
        lerp(weights)
        reference(weights)
    for columns in zip(highs, lows, wide, strict=True):
        for high, low, average in zip(*columns, strict=True):
            assert torch.equal(bits_of(recombine(high, low)), bits_of(average))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, which interprets Triton
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("kernel", KERNELS_HERE)
@pytest.mark.parametrize("finite", [False, True])
def test_infinities_and_nan_match_those_of_float32(kernel: str, finite: bool) -> None:  # noqa: FBT001
    specials = [0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.4e38, -3.4e38]
    average, value = torch.tensor(specials)[:, None].expand(-1, 10).contiguous(), torch.tensor(specials).repeat(10, 1)
    high, low = split_hi_lo(average)
    rounded = high.clone()
    wide = rounded.float()
    for tensor, rounding in (
        (average, None),
        (wide, None),
        (high, CompensatedRounding([[low]])),
        (rounded, StochasticRounding([TensorOffset(0)], 1)),
    ):
        make_kernel([[tensor]], [value], finite=finite, kernel=kernel, rounding=rounding)([0.5], 1)
    recombined = recombine(high, low)
    assert torch.equal(recombined.isnan(), average.isnan())
    assert torch.equal(bits_of(recombined[~recombined.isnan()]), bits_of(average[~average.isnan()]))
    assert torch.equal(rounded.isnan(), wide.isnan())
    assert torch.equal(rounded[wide.isinf()].float(), wide[wide.isinf()])


def noise(seed: int, update_index: int, tensor_offset: TensorOffset, count: int) -> list[int]:
    """The oracle, in Python's integers."""
    base = mix32(hash_int(tensor_offset.tensor_id) ^ track_key(seed, update_index=update_index, track=0))
    return [mix32(base + tensor_offset.offset + index) & 0xFFFF for index in range(count)]


@pytest.mark.parametrize("kernel", KERNELS_HERE)
@pytest.mark.usefixtures("chunk_size")
def test_stochastic_rounding_uses_its_random_bits(kernel: str) -> None:
    """An element is rounded up where its low bits plus its noise carry, in every chunk and shape."""
    values = [torch.randn(shape) for shape in SHAPES]
    averages = [torch.zeros(shape, dtype=torch.bfloat16) for shape in SHAPES]
    tensor_offsets = [TensorOffset(2**40 + index, 2**33 - 2) for index in range(len(values))]
    seed = 12345678901234567890
    make_kernel([averages], values, kernel=kernel, rounding=StochasticRounding(tensor_offsets, seed))([1.0], 17)
    for average, value, tensor_offset in zip(averages, values, tensor_offsets, strict=True):
        bits = bits_of(value.flatten()).tolist()
        noise_bits = noise(seed, 17, tensor_offset, len(bits))
        expected = [to_int32((bit + low) & 0xFFFF0000) >> 16 for bit, low in zip(bits, noise_bits, strict=True)]
        assert bits_of(average.flatten()).tolist() == expected


@pytest.mark.parametrize("kernel", KERNELS_HERE)
@pytest.mark.usefixtures("chunk_size")
def test_a_shard_is_rounded_as_in_the_full_tensor(kernel: str) -> None:
    """A run can be resumed on another number of ranks with the same averages."""
    whole, value = torch.zeros(12, 5).bfloat16(), torch.randn(12, 5)
    parts = [whole[:5].clone(), whole[5:].clone()]
    make_kernel([[whole]], [value], kernel=kernel, rounding=StochasticRounding([TensorOffset(3)]))([0.3], 4)
    for part, rows, offset in ((parts[0], value[:5], 0), (parts[1], value[5:], 25)):
        make_kernel([[part]], [rows], kernel=kernel, rounding=StochasticRounding([TensorOffset(3, offset)]))([0.3], 4)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kernel", KERNELS_HERE)
@pytest.mark.parametrize("changed", ["seed", "update", "tensor", "track"])
def test_other_seeds_updates_tensors_and_tracks_get_other_bits(kernel: str, changed: str) -> None:
    def rounded(*, seed: int = 1, update: int = 1, tensor: int = 1, track: int = 1) -> Tensor:
        tracks = [[torch.zeros(1000).bfloat16()] for _ in range(3)]
        value = torch.full((1000,), 1.001)
        make_kernel(tracks, [value], kernel=kernel, rounding=StochasticRounding([TensorOffset(tensor)], seed))(
            [1.0] * 3, update
        )
        return tracks[track][0]

    assert torch.equal(rounded(), rounded())
    differing = (rounded() != rounded(**{changed: 2})).double().mean()
    up = 0.001 * 128
    torch.testing.assert_close(differing, torch.tensor(2 * up * (1 - up)).double(), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "rounding", [StochasticRounding([TensorOffset(0)]), CompensatedRounding([[torch.zeros(1, dtype=torch.int16)]])]
)
def test_only_bfloat16_averages_are_rounded(rounding: StochasticRounding | CompensatedRounding) -> None:
    message = rf"{type(rounding).__name__}.*\bbfloat16\b.*torch\.float16\b"
    with pytest.raises(ValueError, match=message):
        make_kernel([[torch.ones(1).half()]], [torch.ones(1)], rounding=rounding)


@pytest.mark.parametrize("kernel", KERNELS_HERE)
def test_bfloat16_values_are_not_rounded(kernel: str) -> None:
    """Skipped steps, and copies of bfloat16 weights, are exact; gaps and strides do not matter."""
    averages = sample_tensors(torch.bfloat16)
    values = [with_strides_of(torch.randn_like(average), average) for average in averages]
    before = [average.clone() for average in averages]
    tensor_offsets = [TensorOffset(index) for index in range(len(values))]
    lerp = make_kernel([averages], values, kernel=kernel, rounding=StochasticRounding(tensor_offsets))
    lerp([torch.tensor(0.0)], 1)
    assert all(map(torch.equal, averages, before))
    lerp([1.0], 2)
    assert all(map(torch.equal, averages, values))


@pytest.mark.skipif(IS_INTERPRETED, reason="takes minutes when interpreted")
@pytest.mark.parametrize("kernel", KERNELS_HERE)
def test_long_averages_reach_float32_where_plain_bfloat16_never_changes(kernel: str) -> None:
    """20 000 updates at decay 0.9999, from 1 to 1.5.

    With stochastic rounding each update adds a variance of at most ``change * ulp``, which later updates decay; the
    total is at most ``distance * ulp / 2``. The bounds are six standard deviations, of each element and of their mean.
    """
    count, ulp = 2048, 2.0**-7
    value, begin = torch.full((count,), 1.5), torch.ones(count)
    plain, wide = begin.bfloat16(), begin.clone()
    rounded = begin.bfloat16()
    high, low = split_hi_lo(begin)
    compensated = make_kernel([[high]], [value], kernel=kernel, rounding=CompensatedRounding([[low]]))
    stochastic = make_kernel([[rounded]], [value], kernel=kernel, rounding=StochasticRounding([TensorOffset(0)]))
    for update in range(UPDATES):
        lerp_([wide], [value], WEIGHT)
        compensated([WEIGHT])
        stochastic([WEIGHT], update)
    for _ in range(100):
        lerp_([plain], [value.bfloat16()], WEIGHT)
    assert torch.equal(plain, begin.bfloat16()), "rounding removes each update"
    assert torch.equal(bits_of(recombine(high, low)), bits_of(wide))
    exact = 1.5 - 0.5 * (1 - WEIGHT) ** UPDATES
    torch.testing.assert_close(wide, torch.full_like(wide, exact), atol=1e-4, rtol=0)
    deviation = math.sqrt(0.5 * ulp / 2)
    error = rounded.double() - exact
    assert error.abs().max() < 6 * deviation
    assert error.mean().abs() < 6 * deviation / math.sqrt(count)
