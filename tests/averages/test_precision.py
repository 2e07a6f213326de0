"""bfloat16 averages stay close to float32 ones, on every layout: with stochastic rounding, or with a residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ema_dist import Compensated, ShardedEMA, Stochastic, checkpoint
from ema_dist.sharding import Layout
from tests.support.cli_runs import load_exported, run_ok
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    assert_bitwise_equal,
    full_weights,
    layouts,
    make_net,
    wrap,
)
from tests.support.reshard_cases import run_in_world

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


WEIGHT = 1e-4  # decay 0.9999
UPDATES = 20_000

COMPENSATED: dict[str, Any] = {"dtype": torch.bfloat16, "rounding": Compensated()}
STOCHASTIC: dict[str, Any] = {"dtype": torch.bfloat16, "rounding": Stochastic(seed=7)}

everywhere = layouts("plain", "ddp-3", "fsdp1", "fsdp2-3", "hsdp", "tp", "fsdp2-tp")
by_rows = layouts("plain", "ddp-3", "fsdp1-3", "fsdp1-hybrid", "fsdp2-3", "hsdp")
both_roundings = pytest.mark.parametrize("settings", [STOCHASTIC, COMPENSATED], ids=["stochastic", "compensated"])


def in_bfloat16(layout: str, *, seed: int = 0) -> nn.Module:
    return wrap(layout, make_net(layout, seed=seed).bfloat16())


def shrinking(model: nn.Module, steps: int = 6) -> Iterator[int]:
    """Shrinks the live weights by an eighth at each step, identically on every layout."""
    for step in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.875)
        yield step


def float32_averages(ema: ShardedEMA, **settings: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """The averages on the first rank, without a cast to the live dtype."""
    return ema.full_state_dict(dtype=torch.float32, **settings)


@everywhere
def test_compensated_averages_are_bit_identical_to_float32(layout: str) -> None:
    """Outside and inside of swaps; inside, the model holds the nearest bfloat16, or either one in a tie."""
    model = in_bfloat16(layout)
    reference = ShardedEMA(model, decay={"short": 0.5, "long": 0.99}, start=1, update_interval=2)
    ema = ShardedEMA(model, decay={"short": 0.5, "long": 0.99}, start=1, update_interval=2, **COMPENSATED)
    for _ in shrinking(model):
        reference.update()
        ema.update()
    live = full_weights(model)
    for track in ema.tracks:
        expected = float32_averages(reference, track=track)
        assert_bitwise_equal(float32_averages(ema, track=track), expected)
        with ema.swapped(track):
            shown = full_weights(model)
            assert_bitwise_equal(float32_averages(ema, track=track), expected)
        for name, value in expected.items():
            distance = (value.bfloat16().double() - value.double()).abs()
            assert torch.equal((shown[name] - value.double()).abs().nan_to_num(), distance.nan_to_num()), name
        assert_bitwise_equal(float32_averages(ema, track=track), expected)
        assert_bitwise_equal(full_weights(model), live)


@by_rows
def test_random_bits_are_the_same_on_every_row_sharded_layout(layout: str) -> None:
    net = make_net(layout).bfloat16()
    alone = ShardedEMA(net, decay=0.9, **STOCHASTIC)
    for _ in shrinking(net):
        alone.update()
    model = in_bfloat16(layout)
    ema = ShardedEMA(model, decay=0.9, **STOCHASTIC)
    for _ in shrinking(model):
        ema.update()
    actual, expected = float32_averages(ema), float32_averages(alone)
    if not dist.is_initialized() or dist.get_rank() == 0:
        assert_bitwise_equal(actual, expected)
        share = 0.9**6 + sum(0.1 * 0.9**k * 0.875 ** (6 - k) for k in range(6))
        exact = make_net(layout).bfloat16().head.weight.double() * share
        torch.testing.assert_close(actual["head.weight"].double(), exact, rtol=0.05, atol=0)


@layouts("tp", "fsdp2-tp", "fsdp2-3", "hsdp", "ddp-3", "fsdp1-3")
def test_every_element_gets_its_own_random_bits(layout: str) -> None:
    """Else the mean of many weights would be off by more than it should: blocks of columns, too."""
    shards = Layout(wrap(layout, make_net(layout))).parameters
    own_ranges = {
        name: (shard.averaged_part.global_offset, shard.averaged_part.local.numel()) for name, shard in shards.items()
    }
    ranges_by_rank: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranges_by_rank, own_ranges)
    for name, shard in shards.items():
        offsets = [
            offset
            for global_offset, count in {ranges[name] for ranges in ranges_by_rank}
            for offset in range(global_offset, global_offset + count)
        ]
        assert len(offsets) == len({*offsets}) == shard.shape.numel(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_models_cast_after_construction_get_exact_averages(dtype: torch.dtype) -> None:
    net = make_net("plain").bfloat16()
    ema, reference = ShardedEMA(net, decay=0.9, **COMPENSATED), ShardedEMA(net, decay=0.9)
    for _ in shrinking(net):
        ema.update()
        reference.update()
    net.to(dtype)
    expected = {name: value.to(dtype).double() for name, value in float32_averages(reference).items()}
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    with ema.swapped():
        actual = full_weights(net)
    assert_bitwise_equal({name: actual[name] for name in trained}, {name: expected[name] for name in trained})
    with ema.serving():
        shown = {name: parameter.double() for name, parameter in net.named_parameters()}
    assert_bitwise_equal({name: shown[name] for name in trained}, {name: expected[name] for name in trained})
    assert_bitwise_equal(float32_averages(ema), float32_averages(reference))


@pytest.mark.world_size(2)
@both_roundings
def test_replicas_with_full_copies_agree(settings: dict[str, Any]) -> None:
    model = DistributedDataParallel(make_net("ddp").bfloat16())
    ema = ShardedEMA(model, decay=0.9, replicas="copy", **settings)
    for _ in shrinking(model):
        ema.update()
    with ema.swapped():
        mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(theirs, mine)
    assert torch.equal(theirs[0], theirs[1])


@pytest.mark.parametrize("seed", [0, 2**70])
def test_another_seed_rounds_differently(seed: int) -> None:
    actual = []
    for rounding_seed in (seed, seed, seed + 1):
        net = make_net("plain").bfloat16()
        ema = ShardedEMA(net, decay=0.9, dtype=torch.bfloat16, rounding=Stochastic(rounding_seed))
        for _ in shrinking(net):
            ema.update()
        actual.append(torch.cat([value.flatten() for value in float32_averages(ema).values()]))
    assert torch.equal(actual[0], actual[1])
    assert not torch.equal(actual[0], actual[2])


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
def test_long_averages_keep_up_with_float32(live: torch.dtype) -> None:
    """20 000 updates at decay 0.9999, from 1 to 1.5: the bound is that of tests/kernels/test_low_precision.py."""
    ulp, count = 2.0**-7, 2048
    model = nn.Linear(count, 1, bias=False, dtype=live)
    nn.init.constant_(model.weight, 1.0)
    averages = {
        "float32": ShardedEMA(model, decay=1 - WEIGHT, dtype=torch.float32),
        "stochastic": ShardedEMA(model, decay=1 - WEIGHT, **STOCHASTIC),
        "compensated": ShardedEMA(model, decay=1 - WEIGHT, **COMPENSATED),
    }
    nn.init.constant_(model.weight, 1.5)
    for _ in range(UPDATES):
        for ema in averages.values():
            ema.update()
    actual = {name: float32_averages(ema)["weight"].double() for name, ema in averages.items()}
    assert torch.equal(actual["compensated"], actual["float32"])
    exact = 1.5 - 0.5 * (1 - WEIGHT) ** UPDATES
    deviation = math.sqrt(0.5 * ulp / 2)
    error = actual["stochastic"] - exact
    assert error.abs().max() < 6 * deviation
    assert error.mean().abs() < 6 * deviation / math.sqrt(count)


@both_roundings
def test_steps_may_be_counted_and_left_out_on_the_device(settings: dict[str, Any]) -> None:
    """Random bits depend on the number of the update, on host or device; compensated averages equal float32 there."""
    net = make_net("plain").bfloat16()
    ema = ShardedEMA(net, decay=0.9, **settings)
    reference = ShardedEMA(net, decay=0.9, **(settings if settings is STOCHASTIC else {}))
    for step in shrinking(net):
        left_out = torch.tensor(float(step == 3))
        ema.update(found_inf=left_out)
        if settings is not STOCHASTIC:
            reference.update(found_inf=left_out)
        elif step != 3:
            reference.update()
        assert_bitwise_equal(float32_averages(ema), float32_averages(reference))


def save_dcp(ema: ShardedEMA, folder: Path) -> None:
    dcp.save({"ema": ema}, checkpoint_id=folder)


def load_dcp(ema: ShardedEMA, folder: Path) -> None:
    dcp.load({"ema": ema}, checkpoint_id=folder)


def save_ours(ema: ShardedEMA, folder: Path) -> None:
    checkpoint.save({"ema": ema}, folder, step=3)


def load_ours(ema: ShardedEMA, folder: Path) -> None:
    checkpoint.load({"ema": ema}, folder)


@pytest.mark.world_size(4)
@pytest.mark.parametrize(
    ("source_layout", "target_layout", "inside", "store", "restore"),
    [
        pytest.param("fsdp2", "hsdp", True, save_dcp, load_dcp, id="fsdp2-hsdp-dcp-inside a swap"),
        pytest.param("ddp", "fsdp2", False, save_dcp, load_dcp, id="ddp-fsdp2-dcp"),
        pytest.param("fsdp1", "fsdp2", True, save_dcp, load_dcp, id="fsdp1-fsdp2-dcp-inside a swap"),
        pytest.param("fsdp2", "hsdp", False, save_ours, load_ours, id="fsdp2-hsdp-ours"),
        pytest.param("ddp", "fsdp2", True, save_ours, load_ours, id="ddp-fsdp2-ours-inside a swap"),
        pytest.param("fsdp1", "fsdp2", False, save_ours, load_ours, id="fsdp1-fsdp2-ours"),
    ],
)
@both_roundings
def test_a_resumed_low_precision_run_is_bit_identical(
    source_layout: str,
    target_layout: str,
    inside: bool,  # noqa: FBT001
    store: Callable[[ShardedEMA, Path], None],
    restore: Callable[[ShardedEMA, Path], None],
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    def save() -> None:
        model = in_bfloat16(source_layout)
        ema = ShardedEMA(model, decay=0.9, **settings)
        for step in shrinking(model):
            ema.update()
            if step == 2:
                with ema.swapped() if inside else nullcontext():
                    store(ema, tmp_path / "root")
        torch.save(float32_averages(ema), tmp_path / f"{dist.get_rank()}.pt")

    def load() -> None:
        model = in_bfloat16(target_layout)
        ema = ShardedEMA(model, decay=0.9, **settings)
        for step in shrinking(model):
            if step == 2:
                restore(ema, tmp_path / "root")
            elif step > 2:
                ema.update()
        assert_bitwise_equal(float32_averages(ema), torch.load(tmp_path / f"{dist.get_rank()}.pt"))

    run_in_world(4, tmp_path, save)
    run_in_world(4, tmp_path, load)


@everywhere
def test_full_tensors_go_in_and_come_out_as_float32(layout: str) -> None:
    ema = ShardedEMA(in_bfloat16(layout), decay=0.9, **COMPENSATED)
    expected = make_net(layout, seed=1).state_dict()
    ema.load_full_state_dict(expected)
    target = make_net(layout, seed=2)
    ema.copy_to(target)
    actual = float32_averages(ema)
    for name in dict(make_net(layout).named_parameters()).keys() - {"frozen.weight", "frozen.bias"}:
        assert torch.equal(target.state_dict()[name], expected[name])
        assert not actual or torch.equal(actual[name], expected[name])


def test_compensated_averages_are_stored_and_exported_as_float32(tmp_path: Path) -> None:
    """A checkpoint does not depend on how averages were stored: each kind resumes from that of the other."""
    net = make_net("plain").bfloat16()
    ema, plain = ShardedEMA(net, decay=0.9, **COMPENSATED), ShardedEMA(net, decay=0.9)
    for _ in shrinking(net):
        ema.update()
        plain.update()
    checkpoint.save({"model": net, "ema": ema}, tmp_path / "compensated", step=1)
    checkpoint.save({"model": net, "ema": plain}, tmp_path / "plain", step=1)
    expected = float32_averages(plain)
    run_ok("export", tmp_path / "compensated", tmp_path / "out", "--dtype", "float32")
    assert_bitwise_equal(load_exported(tmp_path / "out"), expected)
    for source, target in (("plain", ema), ("compensated", plain)):
        checkpoint.load({"ema": target}, tmp_path / source)
        assert_bitwise_equal(float32_averages(target), expected)


@both_roundings
def test_buffers_written_inside_a_swap_stay_in_the_average(settings: dict[str, Any]) -> None:
    """They are never split: a residual would belong to the value before."""
    model = nn.BatchNorm1d(3).bfloat16()
    ema = ShardedEMA(model, decay=0.9, **settings)
    assert model.running_mean is not None
    nn.init.constant_(model.running_mean, 1.0)
    ema.update()
    with ema.swapped():
        nn.init.constant_(model.running_mean, 0.3)
    assert torch.equal(float32_averages(ema)["running_mean"], torch.full((3,), 0.3).bfloat16().float())
    assert torch.equal(model.running_mean, torch.ones(3).bfloat16())


def test_averages_of_float32_weights_are_not_split() -> None:
    state = ShardedEMA(nn.Linear(2, 2), decay=0.5, **COMPENSATED).state_dict()
    averages = state["tracks"]["default"]["averages"]
    assert {average.dtype for average in averages.values()} == {torch.float32}
    again = ShardedEMA(nn.Linear(2, 2), decay=0.5, **COMPENSATED)
    again.load_state_dict(state)
    assert torch.equal(again.full_state_dict()["weight"], averages["weight"])


@both_roundings
@pytest.mark.parametrize("layout", ["plain", "fsdp2"])
@pytest.mark.world_size(2)
def test_bfloat16_averages_of_bfloat16_weights_are_served_without_a_copy(layout: str, settings: dict[str, Any]) -> None:
    ema = ShardedEMA(in_bfloat16(layout), decay=0.5, **settings)
    assert ema.serving_mode == "the averages themselves"
    assert ShardedEMA(in_bfloat16(layout), decay=0.5).serving_mode == "a cast copy"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounding": Compensated()}, r"Compensated\(\).*dtype=torch\.bfloat16.*dtype=None"),
        (
            {"rounding": Compensated(), "dtype": torch.float32},
            r"Compensated\(\).*dtype=torch\.bfloat16.*dtype=torch\.float32",
        ),
        ({"rounding": "stochastic"}, r"rounding.*Stochastic\(.*Compensated\(\).*'stochastic'"),
        ({"dtype": torch.float8_e4m3fn}, r"floating-point.*\b16\b.*dtype=torch\.float8_e4m3fn"),
        ({"dtype": torch.int64}, r"floating-point.*\b16\b.*dtype=torch\.int64"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedEMA(nn.Linear(2, 2), **settings)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seed.*Stochastic.*\b0\b.*-1\b"):
        Stochastic(-1)
    with pytest.raises(ValueError, match=r"seed.*Stochastic.*\b0\b.*1\.5"):
        Stochastic(1.5)  # pyrefly: ignore[bad-argument-type]


def test_averages_that_may_stall_are_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"torch\.float16.*1/4096.*dtype=torch\.bfloat16"):
        ShardedEMA(nn.Linear(2, 2), dtype=torch.float16)
