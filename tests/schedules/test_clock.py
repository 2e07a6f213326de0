"""How much a decay weighs an update, and which steps are averaged."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ema_dist import HalfLife, Power, Schedule, ShardedEMA, Uniform
from ema_dist.schedules.clock import Clock
from tests.schedules.laws import FORMULAS, LAWS, expected_updates
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


@pytest.mark.filterwarnings("ignore:decay=:UserWarning")
@pytest.mark.parametrize(
    ("decay", "expected"), [(HalfLife(0), 8.0), (HalfLife(math.inf), 0.0), (0.0, 8.0), (1.0, 0.0), (HalfLife(1), 6.0)]
)
@pytest.mark.filterwarnings("ignore:decay=")  # a number that looks like the weight of the live values
def test_zero_and_infinite_half_lives(decay: HalfLife | float, expected: float) -> None:
    """No averaging, and no update."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ShardedEMA(model, decay=decay)
    nn.init.constant_(model.weight, 8.0)
    ema.update()
    ema.update()
    assert ema.full_state_dict()["weight"].item() == expected


def test_start_follows_and_interval_corrects_the_half_life() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ShardedEMA(model, decay=HalfLife(2), start=2, update_interval=4)
    seen = []
    for value in (1.0, 2.0, 8.0, 8.0, 8.0, 8.0, 8.0, 16.0):  # averaging begins at step 2, updates are at 4 and 8
        nn.init.constant_(model.weight, value)
        ema.update()
        seen.append(ema.full_state_dict()["weight"].item())
    assert seen == [1.0, 2.0, 2.0, 5.0, 5.0, 5.0, 5.0, 13.25]
    assert (ema.steps, ema.updates) == (8, 2)


def test_a_half_life_is_not_negative() -> None:
    with pytest.raises(ValueError, match=r"half-life.*\b0\b.*-1\b"):
        HalfLife(-1)


@pytest.mark.parametrize(
    ("start", "interval", "tokens"), [(0, 1, 4096), (10_000, 3, 4096), (9_999, 4, 1500), (5, 7, 3)]
)
def test_averages_follow_the_float64_reference_in_tokens(start: int, interval: int, tokens: int) -> None:
    """Of every law in one pass, where neither start nor interval divides anything."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ShardedEMA(model, decay=LAWS, start=start, update_interval=interval)
    averages = dict.fromkeys(LAWS, 0.0)
    elapsed = [tokens + 100.0 * step for step in range(20)]
    updates = [*expected_updates(elapsed, start=start, interval=interval)]
    for step, update in enumerate(updates):
        value = math.sin(step) + 2
        nn.init.constant_(model.weight, value)
        ema.update(elapsed=elapsed[step])
        for name, formula in FORMULAS.items():
            averages[name] += update.weight(formula) * (value - averages[name])
    for name, expected in averages.items():
        assert ema.full_state_dict(track=name)["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert (ema.steps, ema.time) == (20, sum(elapsed))
    assert ema.updates == len([update for update in updates if update.arguments])


@pytest.mark.parametrize("law", [HalfLife(3000), Power(sigma_rel=0.1), Uniform()], ids=str)
def test_a_batch_size_ramp_changes_nothing(law: Schedule) -> None:
    """Two steps of 100 samples weigh as much as one of 200, if the live weights are the same after both."""

    def shares(batch_sizes: list[int]) -> list[float]:
        clock = Clock({"default": law}, start=0, interval=1)
        profile: list[float] = []
        for batch_size in batch_sizes:
            step = clock.next_step(batch_size)
            clock.count(step)
            weight = float(step.weights["default"])
            profile = [*(share * (1 - weight) for share in profile), weight]
        return profile

    steady = shares([100] * 40)
    ramped = shares([100] * 10 + [200] * 15)
    assert ramped[:10] == pytest.approx(steady[:10], rel=1e-9)
    assert ramped[10:] == pytest.approx([sum(steady[i : i + 2]) for i in range(10, 40, 2)], rel=1e-9)


def test_integral_times_are_exact_to_2_to_the_53() -> None:
    ends = [2**52 + 1, 2**53 - 1]
    for found_inf in (None, torch.zeros(())):
        clock = Clock({"default": Uniform()}, start=0, interval=1)
        for elapsed in (ends[0], ends[1] - ends[0]):
            clock.count(clock.next_step(elapsed, found_inf))
        assert clock.time == ends[1]


def test_an_attached_optimizer_counts_its_own_time_without_skipped_steps() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    ema = ShardedEMA(model, decay=LAWS)
    tokens = iter([100, 10_000, 7])
    ema.attach(optimizer, elapsed=lambda: next(tokens))
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert (ema.steps, ema.updates, ema.time) == (2, 2, 107.0)
    expected = [*expected_updates([100, 7], start=0, interval=1)]
    for name, formula in FORMULAS.items():
        mass = math.prod(1 - update.weight(formula) for update in expected)
        assert ema.initial_mass(name) == pytest.approx(mass, abs=1e-12)


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averages_under_a_scaler_equal_those_without(default_dtype: torch.dtype) -> None:
    model = nn.Linear(5, 3, dtype=torch.float32)
    with_scaler, without = (ShardedEMA(model, decay=LAWS) for _ in range(2))
    torch.set_default_dtype(default_dtype)
    try:
        for step in range(20):
            nn.init.normal_(model.weight, step)
            with_scaler.update(found_inf=torch.zeros((), dtype=torch.float32))
            without.update()
        for name in LAWS:
            actual, expected = (ema.full_state_dict(track=name)["weight"] for ema in (with_scaler, without))
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("elapsed", [0, -1, math.nan, math.inf, 10**400])
def test_elapsed_is_positive_and_finite(elapsed: float) -> None:
    ema = ShardedEMA(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"elapsed.*positive, finite.*got"):
        ema.update(elapsed=elapsed)
    assert (ema.steps, ema.time) == (0, 0.0)


@pytest.mark.parametrize("elapsed", ["1ba", True, torch.tensor(1.0)], ids=str)
def test_elapsed_is_a_number(elapsed: float) -> None:
    with pytest.raises(TypeError, match=r"elapsed.*number.*got"):
        ShardedEMA(nn.Linear(2, 2)).update(elapsed=elapsed)


def test_a_user_defined_schedule() -> None:
    class Halving:
        def __init__(self, every: int) -> None:
            self.every = every

        def decay(self, *, time: float, elapsed: float, step: float) -> float:  # noqa: ARG002
            return 0.5 ** (elapsed / self.every)

    class Wrong:
        def decay(self, **_: float) -> float:
            return 1.5

    model = nn.Linear(1, 1)
    ema = ShardedEMA(model, decay=Halving(every=2))
    ema.update(elapsed=2)
    assert ema.initial_mass() == 0.5
    with pytest.raises(ValueError, match=r"\[0, 1\].*\b1\.5\b"):
        ShardedEMA(model, decay=Wrong()).update()
    with pytest.raises(TypeError, match=r"law.*got <class.*did you mean Halving\(\)\?"):
        ShardedEMA(model, decay=Halving)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(TypeError, match=r"law.*got namespace"):
        ShardedEMA(model, decay=SimpleNamespace(decay=0.999))  # pyrefly: ignore[bad-argument-type]


def test_an_interval_may_be_an_integer_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    assert Clock({}, start=0, interval=numpy.int64(2)).interval == 2
