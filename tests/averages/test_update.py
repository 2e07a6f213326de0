"""What one update does, and what it must not do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from ema_dist import HalfLife, ShardedEMA
from ema_dist.kernels import CPU_SCRATCH_BYTES
from tests.support.layouts import (
    STORAGE_LAYOUTS,
    Net,
    assert_bitwise_equal,
    full_weights,
    layouts,
    make_net,
    make_trained,
    peak_memory,
    train_step,
    wrap,
)


class Ops(TorchDispatchMode):
    """Records the operators that run, and the tensors they get."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.saw_dtensor = False

    def __torch_dispatch__(
        self,
        function: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        self.names.append(function.name().split(".")[0])
        self.saw_dtensor |= any(issubclass(kind, DTensor) for kind in types)
        return function(*args, **(kwargs or {}))


@layouts(*STORAGE_LAYOUTS, "fsdp2-keep")
def test_an_update_sends_nothing(layout: str) -> None:
    _, ema = make_trained(layout)
    with CommDebugMode() as communication, Ops() as ops:
        ema.update()
    assert communication.get_total_counts() == 0
    assert not [name for name in ops.names if "c10d" in name]


@layouts("plain", "ddp", "fsdp1", "fsdp2", "hsdp", "tp", "fsdp2-tp")
def test_an_update_is_one_foreach_pass_over_plain_tensors_and_asks_the_device_nothing(layout: str) -> None:
    """One lerp per device and dtype, however many parameters."""
    model = wrap(layout, make_net(layout))
    ema = ShardedEMA(model, decay=0.5, buffers="copy")
    with Ops() as ops:
        ema.update()
    assert not ops.saw_dtensor
    assert ops.names.count("aten::_foreach_lerp_") == 1
    assert set(ops.names) <= {"aten::_foreach_lerp_", "aten::_foreach_copy_", "aten::detach"}


def test_averaging_buffers_takes_few_operators_however_many_there_are() -> None:
    """They take the careful way, as they may hold infinities: on a GPU each operator is a launch."""
    model = nn.Sequential(*[nn.BatchNorm1d(4) for _ in range(50)])
    ema = ShardedEMA(model, decay=0.5)
    with Ops() as ops:
        ema.update()
    launches = [name for name in ops.names if name.split("::")[1] not in {"detach", "view", "empty_like", "split"}]
    assert len(launches) < 20


@pytest.mark.parametrize(
    ("live", "average"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16), (torch.float64, None)],
)
def test_mixed_dtypes_follow_the_reference(live: torch.dtype, average: torch.dtype | None) -> None:
    """`_foreach_lerp_` alone refuses them (failure 5)."""
    model = nn.Linear(33, 17).to(live)
    ema = ShardedEMA(model, decay=0.75, dtype=average)
    reference = {name: value.double() for name, value in full_weights(model).items()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        reference = {name: 0.75 * value + 0.25 * full_weights(model)[name] for name, value in reference.items()}
    tolerance = 2e-2 if average is torch.bfloat16 else 1e-6
    for name, value in ema.full_state_dict(dtype=torch.float64).items():
        torch.testing.assert_close(value, reference[name], rtol=tolerance, atol=tolerance)


def test_the_scratch_of_mixed_dtypes_is_bounded() -> None:
    model = nn.Linear(4096, 4096, bias=False).bfloat16()
    ema = ShardedEMA(model, decay=0.5)
    assert peak_memory(ema.update) <= CPU_SCRATCH_BYTES


def test_between_intervals_nothing_is_read() -> None:
    """Not even converted to the averages' dtype."""
    ema = ShardedEMA(nn.Linear(8, 8).bfloat16(), decay=0.5, update_interval=2)
    with Ops() as ops:
        ema.update()
    assert not [name for name in ops.names if "foreach" in name]
    with Ops() as ops:
        ema.update()
    assert [name for name in ops.names if "foreach" in name]


def test_averages_of_bfloat16_weights_move() -> None:
    """In bfloat16 they would stay at 1 forever (failure 4)."""
    model = nn.Linear(2, 2).bfloat16()
    nn.init.ones_(model.weight)
    ema = ShardedEMA(model, decay=0.999)
    nn.init.constant_(model.weight, 1.5)
    for _ in range(1000):
        ema.update()
    expected = 1.5 - 0.5 * 0.999**1000
    torch.testing.assert_close(ema.full_state_dict(dtype=torch.float32)["weight"], torch.full((2, 2), expected))


@layouts("plain", "ddp", "fsdp1", "fsdp1-flat", "fsdp2", "hsdp", "tp")
def test_integer_buffers_equal_the_live_ones(layout: str) -> None:
    """`num_batches_tracked` is a count, not a weight (failure 12)."""
    _, ema = make_trained(layout, buffers="average")
    full = ema.full_state_dict()
    assert not full or full["stats.num_batches_tracked"] == 3


def test_buffers_can_be_copied() -> None:
    model, ema = make_trained("plain", buffers="copy")
    full, live = ema.full_state_dict(), model.state_dict()
    assert torch.equal(full["stats.running_mean"], live["stats.running_mean"])
    assert not torch.equal(full["blocks.0.out.weight"], live["blocks.0.out.weight"])


def test_equal_infinities_stay_and_others_follow() -> None:
    """The difference of two infinities is NaN, and stays: masks are kept as buffers, observers start at infinity."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([1.0, float("inf")]))
    model.register_buffer("mask", torch.tensor([float("-inf"), 0.0, float("inf")]))
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    assert torch.equal(ema.full_state_dict()["mask"], torch.tensor([float("-inf"), 0.0, float("inf")]))
    assert torch.equal(ema.full_state_dict()["weight"], torch.tensor([1.0, float("inf")]))
    model.mask.fill_(2.0)
    ema.update()
    assert torch.equal(ema.full_state_dict()["mask"], torch.tensor([2.0, 1.0, 2.0]))


def test_a_shared_module_without_bias_is_read_once() -> None:
    model = nn.Module()
    model.first = nn.Linear(3, 3, bias=False)
    model.second = model.first
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    assert sorted(ema.full_state_dict()) == ["first.weight", "second.weight"]


def test_buffers_that_are_replaced_are_followed() -> None:
    """Modules may register a new tensor in any forward pass; the old one is dead storage."""
    model = nn.BatchNorm1d(3)
    ema = ShardedEMA(model, decay=0.5)
    model.running_mean = torch.full((3,), 4.0)
    ema.update()
    assert torch.equal(ema.full_state_dict()["running_mean"], torch.full((3,), 2.0))


def test_buffers_whose_storage_is_replaced_are_followed() -> None:
    """As FSDP1 does it at the first forward, with a dtype of its own for buffers."""
    model = nn.BatchNorm1d(3)
    ema = ShardedEMA(model, decay=0.5)
    model.running_mean.data = torch.full((3,), 4.0, dtype=torch.bfloat16)
    ema.update()
    assert torch.equal(ema.full_state_dict()["running_mean"], torch.full((3,), 2.0, dtype=torch.bfloat16))


@pytest.mark.world_size(2)
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_mixed_precision(use_orig_params: bool) -> None:  # noqa: FBT001
    """Averages follow the full-precision pieces; buffers change their dtype at the first forward."""
    precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    net = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))
    model = FullyShardedDataParallel(
        net, device_id=torch.device("cpu"), use_orig_params=use_orig_params, mixed_precision=precision
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, decay=0.5)
    reference = full_weights(model)
    for step in range(3):
        train_step(model, optimizer, step)
        ema.update()
        live = full_weights(model)
        reference = {name: value.lerp(live[name], 0.5) for name, value in reference.items()}
    with ema.swapped():
        pass
    assert_bitwise_equal(full_weights(model), live)
    for name, value in ema.full_state_dict(dtype=torch.float32).items():
        if "num_batches" not in name:
            torch.testing.assert_close(value.double(), reference[name], rtol=1e-5, atol=1e-6)


@layouts("plain", "ddp", "fsdp2")
def test_weights_that_are_no_longer_tied_are_named(layout: str) -> None:
    """The one that is left would ship its live values (`assign=True` and `to_empty()` do it)."""
    model, ema = make_trained(layout)
    inner = model.module if layout == "ddp" else model
    inner.load_state_dict({name: value.clone() for name, value in inner.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match=r"head\.weight.*tied.*'embed\.weight'"):
        ema.update()


def test_non_persistent_buffers_are_left_alone() -> None:
    model, ema = make_trained("plain")
    assert "scratch" not in ema.full_state_dict()
    scratch = model.scratch
    with ema.swapped():
        assert model.scratch is scratch


@pytest.mark.parametrize(
    ("decay", "expected"), [(HalfLife(0), 8.0), (HalfLife(math.inf), 0.0), (0.0, 8.0), (1.0, 0.0), (HalfLife(1), 6.0)]
)
def test_decay_0_and_decay_1(decay: HalfLife | float, expected: float) -> None:
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
    for value in (1.0, 2.0, 8.0, 8.0, 8.0, 8.0, 8.0, 16.0):
        nn.init.constant_(model.weight, value)
        ema.update()
        seen.append(ema.full_state_dict()["weight"].item())
    assert seen == [1.0, 2.0, 2.0, 6.5, 6.5, 6.5, 6.5, 13.625]
    assert (ema.steps, ema.updates) == (8, 2)


@layouts("plain", "ddp", "fsdp1", "fsdp1-flat", "fsdp2", "tp")
def test_attach_counts_real_steps_only(layout: str) -> None:
    """`get_optimizer_state_dict` takes a dummy step on a fresh optimizer."""
    model = wrap(layout, make_net(layout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ema = ShardedEMA(model, decay=0.5)
    handle = ema.attach(optimizer)
    get_optimizer_state_dict(model, optimizer)
    assert ema.steps == 0
    train_step(model, optimizer, 0)
    assert ema.steps == 1
    with pytest.raises(RuntimeError, match=r"optimizer.*remove\(\).*update\(\)"):
        ema.attach(optimizer)
    handle.remove()
    train_step(model, optimizer, 1)
    assert ema.steps == 1
    ema.attach(optimizer)
    train_step(model, optimizer, 2)
    assert ema.steps == 2


def test_a_real_step_with_a_learning_rate_of_zero_counts() -> None:
    """Warm-up starts there."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ema = ShardedEMA(model)
    ema.attach(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert ema.steps == 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("settings", [{}, {"start": 2, "update_interval": 2}])
def test_steps_skipped_by_a_gradient_scaler_are_left_out(fused: bool, settings: dict[str, int]) -> None:  # noqa: FBT001
    """A fused optimizer skips by itself on the device, and its hook fires all the same."""
    model, twin = nn.Linear(3, 3), nn.Linear(3, 3)
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ema = ShardedEMA(model, decay=0.5, **settings)
    ema.attach(optimizer)
    reference = ShardedEMA(twin, decay=0.5, **settings)
    for step in range(8):
        scaler.scale(model(torch.ones(1, 3)).sum()).backward()
        if step in (2, 5):
            model.weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step not in (2, 5):
            twin.load_state_dict(model.state_dict())
            reference.update()
    assert (ema.steps, ema.updates) == (reference.steps, reference.updates) == (6, 6 if not settings else 2)
    for name, value in reference.full_state_dict().items():
        torch.testing.assert_close(ema.full_state_dict()[name], value)
    resumed = ShardedEMA(model, decay=0.5, **settings)
    resumed.load_state_dict(ema.state_dict())
    assert (resumed.steps, resumed.updates) == (ema.steps, ema.updates)


@layouts("plain", "ddp", "fsdp1", "fsdp2", "tp")
def test_averages_follow_weights_that_move_to_other_storage(layout: str) -> None:
    """Views of the old storage would average dead numbers (failure 7)."""
    model, ema = make_trained(layout)
    twin = {name: value.clone() for name, value in full_weights(model).items()}
    before = ema.full_state_dict()
    if layout.startswith("fsdp1"):
        for unit in FullyShardedDataParallel.fsdp_modules(model):
            handle = unit._handle  # noqa: SLF001  as CPU offloading moves it at the first forward
            handle.flat_param._local_shard = handle.flat_param._local_shard.clone()  # noqa: SLF001
            handle.reshard(free_unsharded_flat_param=True)
    else:
        inner = model.module if layout == "ddp" else model
        inner.load_state_dict({name: value.clone() for name, value in inner.state_dict().items()}, assign=True)
        inner.head.weight = inner.embed.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()
    for name, value in ema.full_state_dict().items():
        if name.startswith("blocks"):
            torch.testing.assert_close(value.double(), 0.8 * before[name].double() + 0.2 * (twin[name] + 1))


@layouts("plain", "ddp", "fsdp2")
def test_a_change_of_dtype_is_followed(layout: str) -> None:
    model, ema = make_trained(layout)
    model.to(torch.bfloat16)
    before = ema.full_state_dict(dtype=torch.float32)
    live = full_weights(model)
    ema.update()
    for name, value in ema.full_state_dict(dtype=torch.float32).items():
        if name.startswith("blocks"):
            torch.testing.assert_close(value.double(), 0.8 * before[name].double() + 0.2 * live[name])
    with ema.swapped():
        pass
    assert_bitwise_equal(full_weights(model), live)


@layouts("ddp", "ddp-3")
def test_each_replica_keeps_its_rows_only(layout: str) -> None:
    """Under DDP on R ranks each stores 1/R of the elements, as far as rows can be divided."""
    _, ema = make_trained(layout)
    ranks = dist.get_world_size()
    for name, average in ema.state_dict()["tracks"]["default"]["averages"].items():
        rows = average.shape[0]
        share = -(-rows // ranks)
        mine = max(0, min(share, rows - share * dist.get_rank()))
        assert average.to_local().shape[0] == mine, name


@pytest.mark.world_size(2)
def test_an_unwrapped_model_can_be_declared_replicated() -> None:
    """Gradient averaging done by hand: the group says over which ranks the model is one."""
    net = Net()
    for tensor in [*net.parameters(), *net.buffers()]:
        dist.broadcast(tensor.detach(), 0)
    ema = ShardedEMA(net, decay=0.5, replicas=dist.group.WORLD)
    live = {name: value.clone() for name, value in net.state_dict().items()}
    numel = sum(average.to_local().numel() for average in ema.state_dict()["tracks"]["default"]["averages"].values())
    assert numel < sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    nn.init.zeros_(net.blocks[0].out.weight)
    ema.update()
    with ema.swapped():
        assert torch.equal(net.blocks[0].out.weight, live["blocks.0.out.weight"] / 2)
    assert not net.blocks[0].out.weight.any()


@pytest.mark.world_size(2)
def test_a_replica_group_without_effect_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="replicas=<group>"):
        ShardedEMA(wrap("fsdp2", make_net("fsdp2")), replicas=dist.group.WORLD)


class Decayed(torch.optim.SGD):
    """Steps as its base class does, so often, and writes before and after that."""

    inner = 1
    fails = False

    def step(self, closure: Any = None) -> Any:  # noqa: ANN401
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1)
        for _ in range(self.inner):
            super().step(closure)
        if self.fails:
            raise ValueError("in the middle of a step")
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1)


@pytest.mark.parametrize("inner", [0, 1, 2])
def test_an_optimizer_that_steps_by_another_ones_step_counts_once(inner: int) -> None:
    """The hooks run after either, once torch has wrapped the step of the base class."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = Decayed(model.parameters(), lr=0.0)
    optimizer.inner = inner
    ema = ShardedEMA(model, decay=0.5)
    ema.attach(optimizer)
    optimizer.fails = True
    with pytest.raises(ValueError, match="in the middle"):
        optimizer.step()
    optimizer.fails = False
    nn.init.zeros_(model.weight)
    for _ in range(2):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert ema.updates == 2
    assert ema.full_state_dict()["weight"].item() == 0.5 * (0.5 * 2) + 0.5 * 4
