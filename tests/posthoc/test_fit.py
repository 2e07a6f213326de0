"""Fits against METHODS' published table, a discrete reference, and weighted sums of the values of a real run."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_dist import Cosine, ExponentialWarmup, HalfLife, InverseGamma, Power, ShardedEMA, Uniform, Warmup, posthoc
from ema_dist.posthoc.equations import power_half_life_inner_product
from ema_dist.posthoc.profiles import inner_product, profile_of
from ema_dist.schedules.decay import as_schedule
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

WIDTHS = (0.03, 0.07, 0.15, 0.20, 0.25)
PRECISION = {
    4: ((0.152, 3.5), (0.021, 1.1), (0.054, 1.7), (0.112, 2.1), (0.190, 2.3)),
    8: ((0.063, 4.8), (0.007, 1.3), (0.018, 1.7), (0.042, 2.1), (0.087, 2.3)),
    16: ((0.019, 7.7), (0.002, 1.4), (0.005, 1.7), (0.013, 2.0), (0.035, 2.3)),
}
"""Total variation and amplification by the number of evenly spaced snapshot times, for two tracks, 0.05 and 0.10."""


@pytest.mark.parametrize("times", PRECISION)
def test_two_power_tracks_give_every_width(times: int) -> None:
    snapshots = [(1000 * (k + 1) / times, Power(sigma_rel=s)) for k in range(times) for s in (0.05, 0.10)]
    for width, expected in zip(WIDTHS, PRECISION[times], strict=True):
        fit = posthoc.fit(snapshots, target=Power(sigma_rel=width), at=1000)
        assert (fit.total_variation, fit.amplification) == pytest.approx(expected, abs=0.06)
        assert fit.total_variation == pytest.approx(expected[0], abs=0.001)
        assert sum(fit.coefficients) == pytest.approx(1)


@cache
def weights_of_steps(law: Any, end: int, steps: int) -> Tensor:  # noqa: ANN401
    """The weight of the starting value and of each of ``steps`` values in the average at ``end``, by the recursion."""
    weights = torch.zeros(steps + 1, dtype=torch.float64)
    weights[0] = 1
    for step in range(1, end + 1):
        decay = as_schedule(law).decay(time=float(step), elapsed=1.0, step=step - 1)
        weights *= decay
        weights[step] += 1 - decay
    return weights


def weights_of_target(target: Any, at: int) -> Tensor:  # noqa: ANN401
    if not isinstance(target, posthoc.Window):
        return weights_of_steps(target, at, 600)
    weights = torch.zeros(601, dtype=torch.float64)
    weights[at - int(target.length) + 1 : at + 1] = 1 / target.length
    return weights


MIXED = [(end, law) for end in (150, 300, 450, 600) for law in (HalfLife(30), 0.99, Power(gamma=5), Uniform())]
TARGETS = [Power(sigma_rel=0.07), HalfLife(40), HalfLife(2000), Uniform(), 0.98, posthoc.Window(120)]


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("at", [600, 500])
@pytest.mark.parametrize(
    "laws", [slice(0, None, 1), slice(0, None, 4), slice(2, None, 4)], ids=["mixed", "half-life", "power"]
)
def test_fits_are_those_of_discrete_weights(laws: slice, at: int, target: Any) -> None:  # noqa: ANN401
    """Least squares over the weights of the steps, by the recursion itself, differs by the width of a step only."""
    snapshots = MIXED[laws]
    fit = posthoc.fit(snapshots, target=target, at=at)
    matrix = torch.stack([weights_of_steps(law, end, 600) for end, law in snapshots], dim=1)
    wanted = weights_of_target(target, at)
    found = matrix @ torch.tensor(fit.coefficients, dtype=torch.float64)
    assert found.sum() == pytest.approx(1)
    assert (found - wanted).abs().sum().item() / 2 == pytest.approx(fit.total_variation, abs=0.004)
    best = torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0]
    best_found = matrix @ (best / best.sum())
    assert (found - wanted).norm() <= 1.01 * (best_found - wanted).norm() + 1e-4


RUN = {"half_life": HalfLife(30), "number": 0.97, "narrow": Power(gamma=8), "mean": Uniform()}


@IGNORE_INITIAL_WEIGHTS_WARNING
@pytest.mark.world_size(1)
@pytest.mark.parametrize("start", [0, 40])
@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_the_sum_of_snapshots_is_the_weighted_mean_of_a_real_run(target: Any, start: int) -> None:  # noqa: ANN401
    """Values of the run weighed by the wanted profile; what may differ is bounded by the total variation."""
    model = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    ema = ShardedEMA(model, decay=RUN, start=start)
    values, snapshots, averages = [model.weight.detach().clone()], [], []
    generator = torch.Generator().manual_seed(0)
    for step in range(1, start + 601):
        model.weight.data += torch.randn(3, 5, generator=generator, dtype=torch.float64)
        ema.update()
        if step <= start:
            values.clear()  # averaging begins at the last value that the averages followed
        values.append(model.weight.detach().clone())
        if step > start and (step - start) % 150 == 0:
            snapshots += [(step - start, law) for law in RUN.values()]
            averages += [ema.full_state_dict(track=track)["weight"] for track in RUN]
    fit = posthoc.fit(snapshots, target=target, at=600)
    reconstructed = sum(c * average for c, average in zip(fit.coefficients, averages, strict=True))
    run = torch.stack(values)
    obtained = sum(
        c * weights_of_steps(law, end, 600) for c, (end, law) in zip(fit.coefficients, snapshots, strict=True)
    )
    torch.testing.assert_close(reconstructed, torch.tensordot(obtained, run, dims=1), rtol=0, atol=1e-9)
    wanted = torch.tensordot(weights_of_target(target, 600), run, dims=1)
    largest_error = (fit.total_variation + 0.004) * (run.amax(0) - run.amin(0))
    assert ((reconstructed - wanted).abs() <= largest_error).all()


@pytest.mark.parametrize(("begin", "end"), [(800, 1000), (950, 1000), (0, 1000)])
def test_the_mean_of_a_window_is_a_difference_of_two_means(begin: int, end: int) -> None:
    means = [(time, Uniform()) for time in (begin, end) if time]
    fit = posthoc.fit(means, target=posthoc.Window(end - begin), at=end)
    expected = [-begin / (end - begin), end / (end - begin)][-len(means) :]
    assert fit.coefficients == pytest.approx(expected)
    assert fit.amplification == pytest.approx((begin + end) / (end - begin))
    assert fit.total_variation < 1e-9


def test_equal_snapshots_get_equal_coefficients() -> None:
    """And ten of them say what one does."""
    one = posthoc.fit([(500, Uniform()), (1000, Uniform())], target=HalfLife(300), at=1000)
    ten = posthoc.fit([(500, Uniform()), *[(1000, Power(gamma=0))] * 10], target=HalfLife(300), at=1000)
    assert ten.coefficients == pytest.approx([one.coefficients[0], *[one.coefficients[1] / 10] * 10])
    assert ten.total_variation == pytest.approx(one.total_variation)


@pytest.mark.parametrize("target", [HalfLife(30), Power(gamma=5), Uniform()], ids=repr)
def test_a_target_that_is_stored_is_taken_alone(target: Any) -> None:  # noqa: ANN401
    fit = posthoc.fit(MIXED, target=target, at=600)
    assert fit.coefficients == tuple(float(snapshot == (600, target)) for snapshot in MIXED)
    assert (fit.total_variation, fit.amplification) == (0, 1)


@pytest.mark.parametrize("law", [HalfLife(30), HalfLife(3e5), Power(gamma=0.3), Power(gamma=40), posthoc.Window(77)])
@pytest.mark.parametrize("other", [HalfLife(5), Power(gamma=2.5), Uniform(), posthoc.Window(150)])
@pytest.mark.parametrize(("end", "other_end"), [(400, 400), (200, 500), (500, 200)])
def test_inner_products_are_those_of_densities(law: Any, other: Any, end: float, other_end: float) -> None:  # noqa: ANN401
    a, b = profile_of(law, end), profile_of(other, other_end)
    times = torch.linspace(0, 500, 2_000_001, dtype=torch.float64)
    cells = a.cumulative(times).diff() * b.cumulative(times).diff() / times.diff()
    assert inner_product(a, b) == pytest.approx(cells.sum().item(), rel=2e-5, abs=1e-12)
    assert inner_product(b, a) == pytest.approx(inner_product(a, b), rel=1e-12)


@pytest.mark.parametrize("x", [1e-9, 0.3, 12.0, 800.0])
def test_the_quadrature_is_exact_to_ten_digits(x: float) -> None:
    """The product of an exponential density and a constant one has a closed form."""
    assert power_half_life_inner_product(1.0, 0.0, 1.0, x) == pytest.approx(-math.expm1(-x), rel=1e-10)


def test_half_lives_in_tokens_give_the_coefficients_of_those_in_steps() -> None:
    steps, tokens = (
        posthoc.fit(
            [(unit * time, HalfLife(unit * half_life)) for time in (500, 1000) for half_life in (20, 100)],
            target=HalfLife(unit * 60),
            at=unit * 1000,
        )
        for unit in (1, 4_000_000)
    )
    assert tokens.coefficients == pytest.approx(steps.coefficients, abs=2e-3)
    assert tokens.total_variation == pytest.approx(steps.total_variation, abs=1e-3)


def test_sigma_rel_and_gamma_are_inverse() -> None:
    assert posthoc.gamma(sigma_rel=0.05) == pytest.approx(16.97, abs=0.005)
    assert posthoc.gamma(sigma_rel=0.10) == pytest.approx(6.94, abs=0.005)
    assert posthoc.sigma_rel(gamma=posthoc.gamma(sigma_rel=0.07)) == pytest.approx(0.07)
    for wrong in (0, 0.3, math.nan):
        with pytest.raises(ValueError, match=r"sigma_rel.*0\.28868"):
            posthoc.gamma(sigma_rel=wrong)
    with pytest.raises(ValueError, match=r"gamma.*-1"):
        posthoc.sigma_rel(gamma=-1)


INEXACT = [HalfLife(9, ramp=0.1), HalfLife(ramp=0.1), InverseGamma(), Warmup(), ExponentialWarmup(), Cosine(0.9, 1, 9)]


@pytest.mark.parametrize("law", [*INEXACT, HalfLife(0), 0.0], ids=repr)
def test_laws_without_an_exact_profile_are_refused(law: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=re.escape(repr(law))):
        posthoc.fit([(10, law)], target=Uniform(), at=10)
    with pytest.raises(ValueError, match=re.escape(repr(law))):
        posthoc.fit([(10, Uniform())], target=law, at=10)


@pytest.mark.parametrize(
    ("snapshots", "target", "at", "words"),
    [
        ([], Uniform(), 10, "at least one snapshot"),
        ([(10, Uniform())], Uniform(), 9, r"\b9 .*\b10\b"),
        ([(10, Uniform())], posthoc.Window(11), 10, r"\b11 .*\b10\b"),
        ([(10, Uniform())], posthoc.Window(5), 20, r"15 to 20.*\b10\b"),
        ([(0, Uniform())], Uniform(), 10, "time of a snapshot.* 0"),
        ([(10, Uniform())], Uniform(), math.inf, r"at must be .*inf"),
        ([(10, 1.5)], Uniform(), 10, r"decay.*1\.5"),
    ],
)
def test_wrong_input_is_an_error_with_the_numbers(snapshots: Any, target: Any, at: float, words: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=words):
        posthoc.fit(snapshots, target=target, at=at)


@pytest.mark.parametrize("length", [0, -1, math.inf, math.nan])
def test_a_window_has_a_positive_length(length: float) -> None:
    with pytest.raises(ValueError, match=f"window.*{length}"):
        posthoc.Window(length)
