"""Full tensors: names, values, tied and frozen parts, other models, pipeline stages, memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ema_dist import ShardedEMA, compute_ema
from ema_dist.averages import full_weights as full_weights_module
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    assert_bitwise_equal,
    evaluate,
    full_weights,
    layouts,
    make_net,
    make_trained,
    peak_memory,
    peak_resident_memory,
    wrap,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


@layouts("plain", "ddp", "fsdp1", "fsdp1-flat", "fsdp2", "hsdp", "tp", "ddp-compiled", "fsdp2-checkpointed")
def test_names_are_those_of_the_unwrapped_state_dict(layout: str) -> None:
    """All of them, once; a user's submodule may be called `module` (failure 11)."""
    names = list(make_net(layout).state_dict())
    _, ema = make_trained(layout)
    assert sorted(name for name, _ in ema.gather()) == sorted(names)
    for name, value in ema.gather():
        assert (value is None) == (dist.get_rank() > 0), name


@layouts("plain", "ddp", "fsdp1", "fsdp2-3", "hsdp")
def test_tied_names_share_one_tensor_and_frozen_parameters_are_live(layout: str) -> None:
    model, ema = make_trained(layout)
    live = full_weights(model)
    full = ema.full_state_dict()
    if full:
        assert full["head.weight"] is full["embed.weight"]
        assert torch.equal(full["frozen.weight"].double(), live["frozen.weight"])
        assert all(value.is_contiguous() and value.device.type == "cpu" for value in full.values())


def test_full_tensors_are_copies() -> None:
    model, ema = make_trained("plain")
    full = ema.full_state_dict()
    before = {name: value.clone() for name, value in full.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()
    assert_bitwise_equal(full, before)


def test_a_rank_that_only_sends_waits_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its device holds several full tensors at once. The device is a recorder here."""
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    ema = ShardedEMA(nn.Linear(2, 2))
    layout = ema._live.layout  # noqa: SLF001
    device = torch.device("cuda", 1)
    for shard in layout.shards:
        monkeypatch.setattr(shard, "full", lambda *_: SimpleNamespace(device=device))
    list(full_weights_module.gather(layout, {}, dtype=None, is_destination=False))
    assert waited == [device] * 2


class Counted(nn.Linear):
    """A module with an extra state."""

    def get_extra_state(self) -> dict[str, int]:
        return {"count": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_extra_states_are_included() -> None:
    model = nn.Sequential(Counted(2, 2))
    full = ShardedEMA(model).full_state_dict()
    fresh = nn.Sequential(Counted(2, 2))
    fresh.load_state_dict(full, strict=True)
    assert fresh[0].count == 3
    other = nn.Sequential(Counted(2, 2))
    ShardedEMA(model).copy_to(other)
    assert other[0].count == 3


@layouts("plain", "ddp", "ddp-3", "fsdp1", "fsdp1-flat", "fsdp2", "hsdp", "tp", "fsdp2-tp")
def test_copy_to_overwrites_live_weights(layout: str) -> None:
    """In the same model, one wrapped the same way, and an unwrapped one on every rank."""
    model, ema = make_trained(layout)
    with ema.swapped():
        averaged = full_weights(model)
    same_way, unwrapped = wrap(layout, make_net(layout, seed=1)), make_net(layout, seed=2)
    ema.copy_to(same_way)
    ema.copy_to(unwrapped)
    ema.copy_to(model)
    for other in (same_way, unwrapped, model):
        assert_bitwise_equal(full_weights(other), averaged)
    torch.testing.assert_close(evaluate(model), evaluate(unwrapped), rtol=1e-4, atol=1e-5)


@layouts("plain", "ddp")
def test_copy_to_reaches_every_name_of_a_target_that_is_not_tied(layout: str) -> None:
    _, ema = make_trained(layout)
    target = make_net(layout, seed=1)
    target.head.weight = nn.Parameter(torch.zeros(5, 6))
    ema.copy_to(target)
    assert torch.equal(target.head.weight, target.embed.weight)
    full = target.state_dict() | {"head.weight": torch.ones(5, 6)}
    with pytest.raises(ValueError, match=r"tied.*\bhead\.weight$"):
        ema.load_full_state_dict(full)


@layouts("plain", "ddp", "fsdp1", "fsdp1-flat", "fsdp2-3", "hsdp", "tp")
def test_the_functional_form_between_two_wrapped_models(layout: str) -> None:
    """The seed's closed form; integer buffers are copied, where the seed truncates them."""
    model, _ = make_trained(layout)
    ema_model = wrap(layout, make_net(layout, seed=1))
    live, average = full_weights(model), full_weights(ema_model)
    compute_ema(model, ema_model, smoothing=0.75)
    for name, value in full_weights(ema_model).items():
        expected = (
            0.75 * average[name] + 0.25 * live[name]
            if name.split(".")[-1] not in {"mask", "num_batches_tracked"}
            else live[name]
        )
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.world_size(2)
def test_pipeline_stages_alone_and_united(tmp_path: Path) -> None:
    """Plain names: each stage averages, swaps, saves and loads its own modules; together they are the whole model."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({str(index): nn.Linear(3, 3) for index in range(4)})
    whole = {name: value.clone() for name, value in layers.state_dict().items()}
    mine = {0: ("0", "1"), 1: ("2", "3")}[dist.get_rank()]
    stage = nn.ModuleDict({name: layers[name] for name in mine})
    ema = ShardedEMA(stage, decay=0.5)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(1)
    ema.update()
    expected = {name: value + 0.5 for name, value in whole.items()}
    assert set(ema.full_state_dict()) == {name for name in whole if name[0] in mine}
    united = ema.full_state_dict(pipeline=dist.group.WORLD)
    if dist.get_rank() == 0:
        assert united.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(united[name], value)
    else:
        assert united == {}
    dist.checkpoint.save({"ema": ema}, checkpoint_id=tmp_path)
    regrouped = ShardedEMA(nn.ModuleDict({name: nn.Linear(3, 3) for name in ("1", "2")}), decay=0.5)
    dist.checkpoint.load({"ema": regrouped}, checkpoint_id=tmp_path)
    for name, value in regrouped.full_state_dict().items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.world_size(4)
def test_sharded_pipeline_stages_unite() -> None:
    """Two stages, each of them FSDP2 on two ranks; the pipeline groups join ranks of the same place."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    torch.manual_seed(0)
    layers = {str(index): nn.Linear(3, 5) for index in range(2)}
    whole = {
        f"{key}.{name}": value.clone() for key, layer in layers.items() for name, value in layer.state_dict().items()
    }
    own = str(mesh.get_local_rank("pipeline"))
    stage = fully_shard(nn.Sequential(OrderedDict({own: layers[own]})), mesh=mesh["data"])
    united = ShardedEMA(stage).full_state_dict(pipeline=mesh.get_group("pipeline"))
    assert_bitwise_equal(united, whole if dist.get_rank() == 0 else {})


@pytest.mark.world_size(2)
def test_peak_memory_is_one_tensor_beyond_the_result() -> None:
    """On the first rank; elsewhere one at a time. Gloo's threads may hold the one before for a moment longer."""
    side, count = 3000, 8  # 36 MB each: beyond what malloc keeps for itself when it is freed
    layers = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(count)])
    for layer in layers:
        fully_shard(layer)
    ema = ShardedEMA(fully_shard(layers))
    one = side * side * 4
    result = count * one if dist.get_rank() == 0 else 0
    assert peak_resident_memory(ema.full_state_dict) <= result + 2.5 * one


@pytest.mark.world_size(2)
@pytest.mark.parametrize("wrap_net", [DistributedDataParallel, fully_shard])
def test_tensors_of_other_ranks_peak_at_the_largest(wrap_net: Callable[[nn.Module], nn.Module]) -> None:
    """Of tensors alone. Threads of gloo may hold all the small ones for longer: half of the largest, which is last."""
    layers = [nn.Linear(256, 256, bias=False) for _ in range(16)]
    ema = ShardedEMA(wrap_net(nn.Sequential(*layers, nn.Linear(256, 256 * 32, bias=False))))
    largest = 4 * 256 * 256 * 32
    peak = peak_memory(ema.full_state_dict)
    assert dist.get_rank() == 0 or largest <= peak <= 1.5 * largest


def test_an_update_between_entries_is_refused() -> None:
    """They would be of different steps."""
    ema = ShardedEMA(nn.Linear(2, 2), decay=0.5)
    entries = ema.gather()
    next(entries)
    ema.update()
    with pytest.raises(RuntimeError, match=r"update\(\).*gather\(\)"):
        next(entries)
