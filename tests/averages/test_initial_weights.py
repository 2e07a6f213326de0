"""An average that is still the initial weights is not used as the model's unnoticed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ema_dist import HalfLife, InitialWeightsWarning, OptimizerHookWarning, ShardedEMA, Uniform, Warmup
from tests.support.layouts import layouts, make_net, train_step, wrap


def _swap(ema: ShardedEMA) -> None:
    with ema.swapped():
        pass


def _serve(ema: ShardedEMA) -> None:
    with ema.serving():
        pass


CALLS: dict[str, Callable[[ShardedEMA], object]] = {
    "swapped": _swap,
    "serving": _serve,
    "full_state_dict": ShardedEMA.full_state_dict,
    "gather": lambda ema: [*ema.gather()],
    "copy_to": lambda ema: ema.copy_to(nn.Linear(2, 2)),
}


def write(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def make_written(**settings: Any) -> tuple[nn.Module, ShardedEMA]:  # noqa: ANN401
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, **settings)
    write(model)
    return model, ema


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", CALLS)
def test_each_kind_of_call_warns_once_where_it_is_made(name: str) -> None:
    """The seed of a run, shipped as its result."""
    _, ema = make_written()
    with pytest.warns(InitialWeightsWarning, match=rf"^{name}\(\):.*never updated.*update\(\).*reset\(\)") as caught:
        CALLS[name](ema)
    assert [warning.filename for warning in caught] == [__file__]
    CALLS[name](ema)
    for other in CALLS.keys() - {name, "copy_to"}:
        with pytest.warns(InitialWeightsWarning, match=rf"^{other}\(\):"):
            CALLS[other](ema)


def test_the_warning_names_share_and_schedule_of_each_track() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, decay={"a": HalfLife(100), "b": Uniform(), "c": 0.5})
    for _ in range(2):
        write(model)
        ema.update()
    with pytest.warns(InitialWeightsWarning, match=r"98\.6%.*'a'.*\b2 updates\b.*HalfLife\(100\)"):
        ema.full_state_dict(track="a")
    with pytest.warns(InitialWeightsWarning, match=r"25\.0%.*'c'"):
        ema.full_state_dict(track="c")
    with no_warning():
        ema.full_state_dict(track="b")


def test_the_warning_comes_before_anything_changes() -> None:
    model, ema = make_written()
    live, version = model.weight.clone(), model.weight._version  # noqa: SLF001  has no public name
    with pytest.raises(InitialWeightsWarning), ema.swapped():  # pytest makes warnings errors
        pass
    assert torch.equal(model.weight, live)
    assert model.weight._version == version, "not swapped and undone"  # noqa: SLF001
    _swap(ema)


@pytest.mark.parametrize(
    ("settings", "updates"),
    [({"decay": Warmup()}, 1), ({"decay": 0.5}, 4), ({"start": 5}, 5), ({"start": 5, "update_interval": 3}, 2)],
)
def test_no_warning_after_forgetting_or_before_start(settings: dict[str, Any], updates: int) -> None:
    model, ema = make_written(**settings)
    for _ in range(updates):
        write(model)
        ema.update()
    for call in CALLS.values():
        call(ema)


def test_no_warning_before_the_live_weights_change() -> None:
    """Sanity checks before training, also repeated ones; after a reset or a load the same holds."""
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model)
    state = ema.consolidated_state_dict()
    for begin in (lambda: None, ema.reset, lambda: ema.load_state_dict(state)):
        begin()
        for _ in range(2):
            for call in CALLS.values():
                call(ema)
        write(model)
    with pytest.warns(InitialWeightsWarning):
        ema.full_state_dict()


def test_the_warning_is_repeated_after_a_reset() -> None:
    model, ema = make_written()
    for _ in range(2):
        with pytest.warns(InitialWeightsWarning):
            ema.full_state_dict()
        ema.full_state_dict()
        ema.reset()
        write(model)


def test_steps_without_an_update_are_counted_in_the_warning() -> None:
    model, ema = make_written(update_interval=10, start=2)
    for _ in range(5):
        write(model)
        ema.update()
    with pytest.warns(InitialWeightsWarning, match=r"none of 5 steps.*start=2.*update_interval=10"):
        ema.full_state_dict()


def test_writes_through_data_are_known_by_the_updates() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model)
    model.weight.data.add_(1)
    ema.update()
    with pytest.warns(InitialWeightsWarning, match=r"99\.9%"):
        ema.full_state_dict()


@pytest.mark.parametrize(
    ("skipped", "settings"),
    [
        ([1, 1, 1], {}),  # all of them: the average equals the live weights
        ([1] * 5 + [0] * 9, {"start": 900}),  # averaging has not begun
        ([1, 0, 0, 0, 0], {"update_interval": 4, "decay": HalfLife(25)}),  # whose steps are not equally long
    ],
)
def test_skipped_steps_cause_no_warning_where_they_are_known(skipped: list[int], settings: dict[str, Any]) -> None:
    """On the CPU, a tensor that says whether a step was skipped is read without waiting."""
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, **settings)
    for step, is_skipped in enumerate(skipped):
        if not is_skipped:
            write(model)
        ema.update(elapsed=1 if step < 4 else 100, found_inf=torch.tensor(float(is_skipped)))
    ema.full_state_dict()


@layouts("plain", "ddp", "fsdp1", "fsdp1-flat", "fsdp2", "hsdp", "tp")
@pytest.mark.parametrize("settings", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_every_optimizer_is_seen_to_write(layout: str, settings: dict[str, bool]) -> None:
    """A fused one, and multi-tensor operations on sharded parameters, do not increase version counters."""
    if layout == "tp" and settings != {"foreach": False}:
        pytest.skip("torch refuses plain and sharded parameters in one list")
    model = wrap(layout, make_net(layout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **settings)
    ema = ShardedEMA(model)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", InitialWeightsWarning)
        for _ in range(2):
            with ema.swapped(), torch.no_grad():
                model(torch.ones(2, 6))
        ema.full_state_dict()
        before = [warning for warning in found if warning.category is InitialWeightsWarning]
        train_step(model, optimizer, 0)
        ema.full_state_dict()
    found_initial = [warning for warning in found if warning.category is InitialWeightsWarning]
    assert before == []
    assert len(found_initial) == (not dist.is_initialized() or dist.get_rank() == 0), "on one rank"


@pytest.mark.world_size(2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_warning_that_is_an_error_is_raised_on_every_rank(layout: str) -> None:
    """Raised on the first rank alone, it would leave the others waiting, or in a swap where ranks do not meet."""
    model = nn.Linear(2, 2)
    model = DistributedDataParallel(model) if layout == "ddp" else fully_shard(model)
    ema = ShardedEMA(model, timeout=10)
    write(model)
    with pytest.raises(InitialWeightsWarning, match="never updated"), ema.swapped():
        pass
    _swap(ema)
    ema.check_replicas()


class SharpnessAware(torch.optim.SGD):
    """Steps by two halves, and never by `step`."""

    def first_step(self) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.1)

    def second_step(self) -> None:
        self.first_step()


@pytest.mark.parametrize("call", [ShardedEMA.state_dict, ShardedEMA.full_state_dict, _swap])
def test_a_hook_that_never_runs_warns(call: Callable[[ShardedEMA], object]) -> None:
    model = nn.Linear(2, 2)
    optimizer = SharpnessAware(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, decay=Warmup())
    ema.update()  # the average has forgotten what it began with
    handle = ema.attach(optimizer)
    call(ema)
    optimizer.first_step()
    optimizer.second_step()
    match = r"attach\(\).*SharpnessAware.*first_step.*remove\(\).*update\(\)"
    with pytest.warns(OptimizerHookWarning, match=match):
        call(ema)
    call(ema)
    handle.remove()
    ema.attach(optimizer)
    optimizer.first_step()
    with pytest.warns(OptimizerHookWarning):
        call(ema)


def test_a_hook_that_runs_or_was_removed_is_not_suspected() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, decay=Warmup())
    handle = ema.attach(optimizer)
    handle.remove()
    write(model)
    ema.state_dict()
    ema.attach(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for call in CALLS.values():
        call(ema)


@pytest.mark.world_size(2)
def test_wrapping_in_ddp_after_construction_is_refused() -> None:
    """DDP broadcasts the weights of rank 0: averages on the other ranks started from different weights."""
    model = nn.Sequential(nn.Linear(2, 2))
    whole, part = ShardedEMA(model), ShardedEMA(model[0])
    untouched = ShardedEMA(nn.Linear(2, 2))
    wrapped = DistributedDataParallel(model)
    for ema in (whole, part):
        for call in (ema.update, lambda ema=ema: _swap(ema), lambda ema=ema: _serve(ema)):
            with pytest.raises(ValueError, match=r"DDP wrapped this model.*Wrap the model first"):
                call()
    untouched.update()
    ShardedEMA(wrapped).update()
    alone = ShardedEMA(wrapped.module)
    DistributedDataParallel(wrapped.module, find_unused_parameters=True)  # its ranks held the same weights before
    alone.update()
