"""Each law gives the weights of its formula, for numbers and for tensors on a device, and knows the initial mass."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ema_dist import Cosine, ExponentialWarmup, HalfLife, InverseGamma, Power, Schedule, Uniform, Warmup
from ema_dist.schedules.arithmetic import widest_float
from ema_dist.schedules.clock import Clock
from ema_dist.schedules.decay import as_schedules
from ema_dist.schedules.equations import gamma_from_sigma_rel, sigma_rel_from_gamma
from tests.schedules.laws import FORMULAS, LAWS, expected_updates

runs = given(
    elapsed=st.lists(st.integers(1, 9) | st.just(4096) | st.floats(0.01, 10), min_size=1, max_size=20),
    start=st.integers(0, 30) | st.floats(0, 30),
    interval=st.integers(1, 4),
)


@runs
@settings(deadline=None)
def test_weights_and_initial_masses_follow_the_formulas(elapsed: list[float], start: float, interval: int) -> None:
    clock = Clock(as_schedules(LAWS), start=start, interval=interval)
    masses = dict.fromkeys(LAWS, 1.0)
    for time, update in zip(elapsed, expected_updates(elapsed, start=start, interval=interval), strict=True):
        if update.arguments:
            t, d, _ = update.arguments
            assert d <= t
        step = clock.next_step(time)
        clock.count(step)
        for name, formula in FORMULAS.items():
            weight = update.weight(formula)
            assert step.weights[name] == pytest.approx(weight, rel=1e-9, abs=1e-9)
            masses[name] = 1.0 if update.is_following else masses[name] * (1 - weight)
            assert clock.initial_mass(name) == pytest.approx(masses[name], rel=1e-9, abs=1e-9)


@runs
@settings(deadline=None, max_examples=30)
def test_a_device_computes_what_the_host_does(elapsed: list[float], start: float, interval: int) -> None:
    """Steps that the device knows to be skipped count for nothing, and the host knows a lower bound of the masses."""
    on_host = Clock(as_schedules(LAWS), start=start, interval=interval)
    on_device = Clock(as_schedules(LAWS), start=start, interval=interval)
    for time in elapsed:
        step = on_host.next_step(time)
        on_host.count(step)
        skipped = on_device.next_step(time, torch.ones(1))
        on_device.count(skipped)
        counted = on_device.next_step(time, torch.zeros(()))
        on_device.count(counted)
        for name, weight in step.weights.items():
            assert float(skipped.weights[name]) == 0
            assert counted.weights[name].dtype == torch.float64
            assert float(counted.weights[name]) == pytest.approx(weight, rel=1e-12, abs=1e-15)
    expected, actual = on_host.read_on_host(), on_device.read_on_host()
    assert actual[:6] == expected[:6]
    assert actual.initial_masses == pytest.approx(expected.initial_masses, rel=1e-12, abs=1e-300)
    assert actual.last_decays == pytest.approx(expected.last_decays, rel=1e-12)


@pytest.mark.parametrize(("start", "interval"), [(0, 1), (7, 3)])
def test_the_initial_mass_if_no_step_is_skipped_is_a_lower_bound_if_steps_are_equally_long(
    start: int, interval: int
) -> None:
    clock = Clock(as_schedules(LAWS), start=start, interval=interval)
    for number in range(40):
        clock.count(clock.next_step(2, torch.tensor(float(number % 5 == 0))))
        for name in LAWS:
            assert clock._states.if_none_skipped.initial_masses[name] <= clock.initial_mass(name) + 1e-15  # noqa: SLF001


class Operators(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> object:  # noqa: ANN401
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def test_the_host_never_waits_for_the_device() -> None:
    """A meta tensor has no value that could be read; numbers are not copied to the device either, which would wait."""
    clock = Clock(as_schedules(LAWS), start=3000, interval=2)
    with Operators() as operators:
        for _ in range(8):
            step = clock.next_step(1000, torch.zeros((), device="meta"))
            clock.count(step)
    assert {(weight.dtype, weight.device.type) for weight in step.weights.values()} == {(torch.float64, "meta")}
    assert step.update_index.dtype == torch.int64
    assert not clock.is_known
    assert all(0 <= clock.known.initial_masses[name] <= 1 for name in LAWS)
    assert (clock.known.steps, clock.known.is_following) == (8, False)
    assert operators.names.isdisjoint({"aten::scalar_tensor", "aten::_local_scalar_dense", "aten::copy_"})


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_are_float64_whatever_the_default_dtype(default_dtype: torch.dtype) -> None:
    """A step under a gradient scaler weighs as much as one without."""
    on_host, on_device = (Clock(as_schedules(LAWS), start=3, interval=2) for _ in range(2))
    torch.set_default_dtype(default_dtype)
    try:
        for _ in range(300):
            expected, step = on_host.next_step(1.1), on_device.next_step(1.1, torch.zeros(()))
            on_host.count(expected)
            on_device.count(step)
            for name, weight in expected.weights.items():
                assert step.weights[name].dtype == torch.float64
                assert float(step.weights[name]) == pytest.approx(weight, rel=1e-12, abs=1e-15)
        assert on_device.read_on_host()[:6] == on_host.read_on_host()[:6]
        assert on_device.initial_mass("half_life") == pytest.approx(on_host.initial_mass("half_life"), rel=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_mps_has_no_float64() -> None:
    assert widest_float(torch.device("mps")) == torch.float32


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (12**-0.5, 0.0)])
def test_the_exponent_of_a_width(sigma_rel: float, gamma: float) -> None:
    assert gamma_from_sigma_rel(sigma_rel) == pytest.approx(gamma, abs=5e-3)
    assert sigma_rel_from_gamma(gamma_from_sigma_rel(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)


@pytest.mark.parametrize(
    ("edm2", "t", "d", "beta"),
    [(0.05, 1e6, 1024, 0.981752), (0.10, 1e6, 1024, 0.991901), (0.05, 1024, 1024, 0.0)],
)
def test_power_laws_are_those_of_edm2(edm2: float, t: float, d: float, beta: float) -> None:
    """By its formula, ``(1 - d / t) ** (gamma + 1)``, with gamma 16.97 and 6.94."""
    assert Power(sigma_rel=edm2).decay(time=t, elapsed=d, step=0) == pytest.approx(beta, abs=1e-5)


def test_the_defaults_of_edm_and_torchtitan() -> None:
    """EDM: a half-life of 500k images, or 5 % of the images seen; torchtitan: 5 % of the updates."""
    edm = HalfLife(500_000, ramp=0.05)
    assert edm.decay(time=1e6, elapsed=512, step=0) == 0.5 ** (512 / 50_000)
    assert edm.decay(time=1e8, elapsed=512, step=0) == 0.5 ** (512 / 500_000)
    assert HalfLife(ramp=0.05).decay(time=200, elapsed=1, step=199) == 0.5 ** (1 / 10)


@pytest.mark.parametrize(
    ("law", "text"),
    [
        (HalfLife(60), "HalfLife(60)"),
        (HalfLife(60, ramp=0.05), "HalfLife(60, ramp=0.05)"),
        (HalfLife(ramp=0.05), "HalfLife(ramp=0.05)"),
        (Power(sigma_rel=0.1), "Power(sigma_rel=0.1)"),
        (Uniform(), "Uniform()"),
        (Warmup(), "Warmup(decay=0.9999)"),
        (Cosine(0.996, 1, 1000), "Cosine(first=0.996, last=1, total=1000)"),
    ],
)
def test_a_law_shows_what_a_user_writes(law: Schedule, text: str) -> None:
    assert repr(law) == text
    assert eval(text) == law
    assert hash(eval(text)) == hash(law)
    with pytest.raises(FrozenInstanceError):
        law.anything = 1  # pyrefly: ignore[missing-attribute]


@pytest.mark.parametrize(
    ("law", "arguments", "message"),
    [
        (HalfLife, {}, r"HalfLife\(1000\).*neither"),
        (HalfLife, {"ramp": 0}, r"ramp.*positive.*\b0\b"),
        (HalfLife, {"ramp": math.nan}, r"ramp.*\bnan\b"),
        (Power, {}, "either gamma or sigma_rel"),
        (Power, {"gamma": 1, "sigma_rel": 0.1}, r"either.*gamma=1\b.*sigma_rel=0\.1"),
        (Power, {"gamma": -0.5}, r"gamma.*\b0\b.*-0\.5"),
        (Power, {"gamma": math.inf}, r"gamma.*finite.*\binf\b"),
        (Power, {"sigma_rel": 0.29}, r"sigma_rel.*0\.28868.*\b0\.29\b"),
        (Power, {"sigma_rel": 1e-160}, r"sigma_rel.*\b1e-09\b.*\b1e-160\b"),
        (Power, {"sigma_rel": 0}, r"sigma_rel.*\b0\b"),
        (InverseGamma, {"power": 0}, r"power.*\b0\b"),
        (InverseGamma, {"inv_gamma": -1}, r"inv_gamma.*-1\b"),
        (InverseGamma, {"decay": 0.5, "min_decay": 0.6}, r"min_decay.*\b0\.6\b"),
        (Warmup, {"decay": 1.5}, r"decay.*\[0, 1\].*\b1\.5\b"),
        (ExponentialWarmup, {"tau": 0}, r"tau.*\b0\b"),
        (Cosine, {"first": -1, "last": 1, "total": 10}, r"first.*\[0, 1\].*-1\b"),
        (Cosine, {"first": 0.9, "last": 1, "total": 0}, r"total.*positive.*\b0\b"),
    ],
)
def test_a_law_out_of_range_is_refused(law: Any, arguments: dict[str, Any], message: str) -> None:  # noqa: ANN401
    with pytest.raises((ValueError, TypeError), match=message):
        law(**arguments)


@pytest.mark.parametrize("value", ["1000ba", None, True, torch.tensor(1.0)], ids=str)
def test_a_half_life_that_is_no_number_is_refused(value: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=r"HalfLife needs a value|a half-life must be a number.*got"):
        HalfLife(value)


def test_a_ramp_is_a_power_in_the_limit() -> None:
    """Of many short steps; `METHODS`: gamma = ln 2 / ramp - 1."""
    ramp, power = HalfLife(ramp=0.05), Power(gamma=math.log(2) / 0.05 - 1)
    arguments = {"time": 1e6, "elapsed": 1.0, "step": 0}
    assert 1 - ramp.decay(**arguments) == pytest.approx(1 - power.decay(**arguments), rel=1e-4)


def test_the_old_name_of_a_half_life_warns() -> None:
    with pytest.warns(DeprecationWarning, match=r"HalfLife\.value"):
        assert HalfLife(60).steps == 60
