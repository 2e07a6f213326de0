"""Several tracks in one pass, by every kernel, against float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ema_dist.kernels import follow_, scratch
from kernel_lists import assert_close, followed, tensors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = [0.125, 0.75, 1.0, 0.0]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors are cut, too."""
    monkeypatch.setattr(scratch, "CPU_SCRATCH_BYTES", 256)
    monkeypatch.setattr(scratch, "CPU_CHUNK_BYTES", 256)


@pytest.mark.parametrize(("average", "live"), [*product(DTYPES, repeat=2)])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("finite", [False, True])
def test_each_track_equals_the_float64_reference(
    average: torch.dtype,
    live: torch.dtype,
    count: int,
    on_device: bool,  # noqa: FBT001
    finite: bool,  # noqa: FBT001
) -> None:
    """Every pair of dtypes, weights of the host and of the device, 0 and 1 among them, the careful way or not."""
    tracks, values = [tensors(average) for _ in range(count)], tensors(live)
    weights = WEIGHTS[:count]
    expected = [
        [followed(a, v, weight) for a, v in zip(track, values, strict=True)]
        for track, weight in zip(tracks, weights, strict=True)
    ]
    before = [value.clone() for value in values]
    follow_(tracks, values, [torch.tensor(weight) if on_device else weight for weight in weights], finite=finite)
    for track, reference in zip(tracks, expected, strict=True):
        assert_close(track, reference)
    assert all(map(torch.equal, values, before))


def test_tracks_may_differ_in_dtype() -> None:
    """Each is converted to its own."""
    tracks, values = [tensors(dtype) for dtype in DTYPES], tensors(torch.bfloat16)
    expected = [[followed(a, v, 0.25) for a, v in zip(track, values, strict=True)] for track in tracks]
    follow_(tracks, values, [0.25] * len(tracks))
    for track, reference in zip(tracks, expected, strict=True):
        assert_close(track, reference)


def test_tracks_do_what_one_track_does_to_the_bit() -> None:
    """A track more changes nothing for the others."""
    tracks, values = [tensors(torch.float32) for _ in range(3)], tensors(torch.bfloat16)
    alone = [[average.clone() for average in track] for track in tracks]
    weights = [0.1, torch.tensor(0.3), 1.0]
    follow_(tracks, values, weights)
    for track, weight in zip(alone, weights, strict=True):
        follow_([track], values, [weight])
    assert all(torch.equal(a, b) for pair in zip(tracks, alone, strict=True) for a, b in zip(*pair, strict=True))


def test_a_weight_for_each_track_is_asked_for() -> None:
    with pytest.raises(ValueError, match="expected a weight for each of the 2 tracks, found 1"):
        follow_([[torch.ones(1)]] * 2, [torch.ones(1)], [0.5])


def test_nothing_to_follow_is_nothing_to_do() -> None:
    follow_([[], []], [], [0.5, 0.5])
    follow_([], [torch.ones(1)], [])
