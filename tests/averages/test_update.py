"""What one update does, and what it must not do."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from ema_dist import ShardedEMA
from ema_dist.kernels import CPU_SCRATCH_BYTES
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
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

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


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


def test_non_persistent_buffers_are_left_alone() -> None:
    model, ema = make_trained("plain")
    assert "scratch" not in ema.full_state_dict()
    scratch = model.scratch
    with ema.swapped():
        assert model.scratch is scratch


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
