"""Wrappers of other packages, composable replication, expert parallelism and tensor subclasses work or are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ema_dist import ShardedEMA, checkpoint
from ema_dist.sharding import compat, local_tensor
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal
from tests.support.quantized import Quantized

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


class Wrapper(nn.Module):
    """Holds the model in the attribute that the package chose, and perhaps a second time in another."""

    def __init__(self, **attributes: nn.Module) -> None:
        super().__init__()
        for name, module in attributes.items():
            setattr(self, name, module)


class Experts(nn.Module):
    """Weights of four experts, one in each row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 5))
        self.bias = nn.Parameter(torch.randn(4, 6))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), nn.Linear(6, 3))


def _full(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.named_parameters()
    }


def _double(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            local_tensor(parameter).mul_(2)


def _require_exact(model: nn.Module, root: Path) -> None:
    """Averages are 1.25 w after the weights w became 2 w, however they are read."""
    first = _full(model)
    ema = ShardedEMA(model, decay=0.75)
    _double(model)
    ema.update()
    with ema.swapped():
        averages = _full(model)
    assert averages.keys() == first.keys()
    assert all(torch.equal(averages[name], 1.25 * value) for name, value in first.items())
    full = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert all(torch.equal(full[name], value) for name, value in averages.items())
    state = {"model": model, "ema": ema}
    checkpoint.save(state, root, step=1)
    _double(model)
    ema.update()
    checkpoint.load(state, root)
    assert all(torch.equal(value, 2 * first[name]) for name, value in _full(model).items())
    with ema.swapped():
        assert all(torch.equal(value, averages[name]) for name, value in _full(model).items())


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_composable_ddp(tmp_path: Path) -> None:
    _require_exact(replicate(_net()), tmp_path)


@pytest.mark.world_size(2)
def test_composable_replication_by_fsdp2(tmp_path: Path) -> None:
    module = pytest.importorskip("torch.distributed._composable.replicate_with_fsdp", reason="torch 2.9 brought it")
    model, mesh = _net(), init_device_mesh("cpu", (2,))
    for part in [*model, model]:
        module.replicate(part, mesh=mesh)
    _require_exact(model, tmp_path)


@pytest.mark.world_size(4)
@pytest.mark.parametrize("sharded_along", [None, 0, 1], ids=["experts only", "FSDP on dim 0", "FSDP on dim 1"])
def test_expert_parallelism(sharded_along: int | None, tmp_path: Path) -> None:
    """Experts on a mesh of two dimensions, the other weights on all ranks."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    model = nn.ModuleDict({"dense": nn.Linear(8, 8), "experts": Experts(), "out": nn.Linear(8, 3)})
    for name, parameter in [*model["experts"].named_parameters()]:
        own = distribute_tensor(parameter.detach(), mesh["expert"], [Shard(0)])
        model["experts"].register_parameter(name, nn.Parameter(own))
    if sharded_along is not None:
        fully_shard(model["experts"], mesh=mesh["data"], shard_placement_fn=lambda _: Shard(sharded_along))
    for name in ("dense", "out"):
        fully_shard(model[name], mesh=init_device_mesh("cpu", (4,)))
    _require_exact(model, tmp_path)


def _fabric(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    package = ModuleType("lightning.fabric.wrappers")
    package._FabricModule = Wrapper  # noqa: SLF001
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return Wrapper(_forward_module=DistributedDataParallel(model), _original_module=model)


def _deepspeed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    package = ModuleType("deepspeed.runtime.engine")
    package.DeepSpeedEngine = Wrapper
    monkeypatch.setitem(sys.modules, package.__name__, package)
    engine = Wrapper()
    engine.__dict__["module"] = model  # not registered, as in the engine
    return engine


@pytest.mark.world_size(2)
@pytest.mark.parametrize(("wrap", "is_split_over_ranks"), [(_fabric, True), (_deepspeed, False)])
def test_wrappers_of_other_packages_add_nothing_to_names(
    wrap: Callable[[nn.Module, pytest.MonkeyPatch], nn.Module],
    is_split_over_ranks: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And averages are split among the replicas of the DDP inside."""
    model = _net()
    first = _full(model)
    ema = ShardedEMA(wrap(model, monkeypatch), decay=0.75)
    _double(model)
    ema.update()
    with ema.swapped():
        assert all(torch.equal(value, 1.25 * first[name]) for name, value in _full(model).items())
    averages = ema.state_dict()["tracks"]["default"]["averages"]
    assert averages.keys() == first.keys()
    assert any(isinstance(value, DTensor) for value in averages.values()) == is_split_over_ranks
    full = ema.full_state_dict()
    if dist.get_rank() == 0:
        assert full.keys() == model.state_dict().keys()


def test_parameters_that_zero_3_partitions_are_refused_by_name() -> None:
    model = _net()
    model[2].weight.data = torch.empty(0)
    model[2].weight.ds_id = 7
    with pytest.raises(ValueError, match=r"'2\.weight'.*ZeRO-3.*fully_shard"):
        ShardedEMA(model)


class _Elastic(dist.ProcessGroup):
    """A group that torch.distributed has not made, such as torchft's."""

    def __init__(self, replicas: int) -> None:
        super().__init__(0, replicas)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("replicas", [1, 2])
def test_elastic_replicas_keep_whole_averages(replicas: int) -> None:
    """Also if only one is there at first."""
    model = DistributedDataParallel(_net())
    model.process_group = _Elastic(replicas)
    with pytest.raises(ValueError, match=r"_Elastic.*torchft.*replicas=.copy"):
        ShardedEMA(model)
    ema = ShardedEMA(model, decay=0.75, replicas="copy")
    ema.update()
    with ema.swapped():
        assert all(torch.equal(value, _full(_net())[name]) for name, value in _full(model.module).items())


@pytest.mark.world_size(1)
def test_frozen_subclasses_of_one_shape_are_not_taken_for_tied() -> None:
    """Torch says that the address of each is 0."""
    model = nn.Module()
    for index in range(2):
        quantized = Quantized(torch.full((2, 2), index, dtype=torch.int8))
        assert quantized.data_ptr() == 0
        model.register_parameter(f"w{index}", nn.Parameter(quantized, requires_grad=False))
    model.trained = nn.Parameter(torch.ones(2))
    full = ShardedEMA(model).full_state_dict()
    assert [full[f"w{index}"].values[0, 0].item() for index in range(2)] == [0, 1]


def test_trained_subclasses_are_refused_by_name() -> None:
    model = _net()
    model[2].weight = nn.Parameter(Quantized(torch.ones(3, 6, dtype=torch.int8)))
    with pytest.raises(ValueError, match=r"2\.weight.*Quantized.*select="):
        ShardedEMA(model)
    ShardedEMA(model, select=lambda name, _: name != "2.weight").update()


@pytest.mark.world_size(4)
@pytest.mark.parametrize("gathers", [False, True])
def test_uneven_fsdp2_over_tp_is_refused_where_torch_gathers_it_wrongly(
    gathers: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "GATHERS_UNEVEN_STRIDED_SHARDS", gathers)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 6))
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    parallelize_module(net, mesh["model"], {"0": ColwiseParallel(), "1": ColwiseParallel()})
    fully_shard(net, mesh=mesh["data"])
    if gathers:
        assert_bitwise_equal(ShardedEMA(net).full_state_dict(), expected if dist.get_rank() == 0 else {})
    else:
        with pytest.raises(ValueError, match=r"'1\.weight' of shape \(6, 8\).*dimension 0.*torch \d.*divisible by 4"):
            ShardedEMA(net)
