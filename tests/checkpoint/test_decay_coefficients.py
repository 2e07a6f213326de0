"""The coefficients of a merge, against the update weights that they emulate."""

from __future__ import annotations

from math import cos, fsum, pi, sqrt

import pytest

from ema_dist.checkpoint.combine.decay_coefficients import DecayShape, check_coefficients, decay_coefficients


def test_a_linear_decay_is_the_mean() -> None:
    assert decay_coefficients("linear", 8) == [1 / 8] * 8
    assert decay_coefficients("linear", 10) == pytest.approx([0.1] * 10, rel=1e-12)


def test_one_minus_sqrt_puts_most_on_the_oldest() -> None:
    coefficients = decay_coefficients("1-sqrt", 10)
    assert coefficients[0] == pytest.approx(sqrt(0.1))
    assert round(coefficients[0], 2) == 0.32
    assert coefficients == sorted(coefficients, reverse=True)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "cosine"])
def test_updates_get_the_weights_of_the_decay(shape: DecayShape, count: int) -> None:
    rates = {"linear": lambda x: 1 - x, "1-sqrt": lambda x: 1 - sqrt(x), "cosine": lambda x: (1 + cos(pi * x)) / 2}
    coefficients = decay_coefficients(shape, count)
    assert len(coefficients) == count
    for update in range(1, count):  # is in all checkpoints from this one on
        assert fsum(coefficients[update:]) == pytest.approx(rates[shape](update / count))
    assert fsum(coefficients) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("coefficients", "expected"), [([0.5], "3.*1"), ([0.5, 0.5, 1e-5], "1.00001")])
def test_numbers_that_do_not_match_are_in_the_error(coefficients: list[float], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_coefficients(coefficients, 3)
