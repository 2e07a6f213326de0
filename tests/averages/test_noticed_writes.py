"""Which writes to the live weights count for the warnings about averages that were not updated."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_model_state_dict

from ema_dist import HalfLife, InitialWeightsWarning, OptimizerHookWarning, Power, ShardedEMA, checkpoint
from tests.support.layouts import layouts, make_net, train_step, wrap

Make = Callable[[], tuple[nn.Module, torch.optim.Optimizer, ShardedEMA]]


class HalfSteps(torch.optim.SGD):
    """Has methods for parts of a step, as in sharpness-aware minimization."""

    def first_step(self) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.1)


def make(decay: Any = None, *, attached: bool = False) -> tuple[nn.Module, HalfSteps, ShardedEMA]:  # noqa: ANN401
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = HalfSteps(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, decay=decay or HalfLife(1000))
    if attached:
        ema.attach(optimizer)
    return model, optimizer, ema


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()


def _swap(ema: ShardedEMA) -> None:
    with ema.swapped():
        pass


@contextmanager
def warnings_as_errors() -> Iterator[None]:
    """`layouts` ignores warnings about initial weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", InitialWeightsWarning)
        warnings.simplefilter("error", OptimizerHookWarning)
        yield


@layouts("plain", "ddp", "fsdp2")
@warnings_as_errors()
def test_a_swap_of_one_average_is_no_write_for_another(layout: str) -> None:
    model = wrap(layout, make_net(layout))
    first, second = ShardedEMA(model), ShardedEMA(model)
    for _ in range(2):
        _swap(first)
        _swap(second)
    second.full_state_dict()


@layouts("plain", "ddp", "fsdp1-flat", "fsdp2")
@warnings_as_errors()
def test_a_dummy_step_is_no_write_and_no_step(layout: str) -> None:
    """`get_optimizer_state_dict` takes one on a fresh optimizer."""
    model = wrap(layout, make_net(layout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ema = ShardedEMA(model)
    get_optimizer_state_dict(model, optimizer)
    _swap(ema)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    get_optimizer_state_dict(model, optimizer)
    with pytest.raises(InitialWeightsWarning):
        _swap(ema)


def test_a_dummy_step_does_not_hide_that_the_hook_never_runs(tmp_path: Path) -> None:
    model, optimizer, ema = make(attached=True)
    checkpoint.save({"model": model, "optim": optimizer, "ema": ema}, tmp_path, step=0)
    optimizer.first_step()
    with pytest.warns(OptimizerHookWarning):
        ema.state_dict()


def test_copying_the_averages_into_the_live_model_is_no_write() -> None:
    model, _, ema = make()
    ema.copy_to(model)
    ema.full_state_dict()


def _resume_by_load_state_dict(make_run: Make, saved: Make, _folder: Path) -> ShardedEMA:
    (model, _, ema), (saved_model, _, saved_ema) = make_run(), saved()
    ema.load_state_dict(saved_ema.consolidated_state_dict())
    model.load_state_dict(saved_model.state_dict())
    return ema


def _resume_by_assigning(make_run: Make, saved: Make, _folder: Path) -> ShardedEMA:
    (model, _, ema), (saved_model, _, saved_ema) = make_run(), saved()
    ema.load_state_dict(saved_ema.consolidated_state_dict())
    model.load_state_dict(saved_model.state_dict(), assign=True)
    return ema


def _resume_by_dcp(make_run: Make, saved: Make, folder: Path) -> ShardedEMA:
    (model, _, ema), (saved_model, _, saved_ema) = make_run(), saved()
    dcp.save({"model": saved_model.state_dict(), "ema": saved_ema}, checkpoint_id=folder)
    state = {"model": get_model_state_dict(model), "ema": ema}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    return ema


def _resume_in_two_loads(make_run: Make, saved: Make, folder: Path) -> ShardedEMA:
    (model, _, ema), (saved_model, _, saved_ema) = make_run(), saved()
    checkpoint.save({"model": saved_model, "ema": saved_ema}, folder, step=1)
    checkpoint.load({"ema": ema}, folder)
    checkpoint.load({"model": model}, folder)
    return ema


RESUMES = [_resume_by_load_state_dict, _resume_by_assigning, _resume_by_dcp, _resume_in_two_loads]


@pytest.mark.world_size(1)
@pytest.mark.parametrize("resume", RESUMES)
@pytest.mark.parametrize("steps", [0, 5])
def test_live_weights_may_be_loaded_after_their_averages(resume: Any, steps: int, tmp_path: Path) -> None:  # noqa: ANN401
    def saved() -> tuple[nn.Module, torch.optim.Optimizer, ShardedEMA]:
        model, optimizer, ema = make(Power(gamma=3), attached=True)
        train(model, optimizer, steps)
        return model, optimizer, ema

    ema = resume(lambda: make(Power(gamma=3), attached=True), saved, tmp_path)
    for call in (_swap, ShardedEMA.state_dict, ShardedEMA.full_state_dict):
        call(ema)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("resume", RESUMES)
def test_a_load_does_not_silence_the_warning(resume: Any, tmp_path: Path) -> None:  # noqa: ANN401
    def updated() -> tuple[nn.Module, torch.optim.Optimizer, ShardedEMA]:
        model, optimizer, ema = make(attached=True)
        train(model, optimizer, 5)
        return model, optimizer, ema

    def never_updated() -> tuple[nn.Module, torch.optim.Optimizer, ShardedEMA]:
        model, optimizer, ema = make()
        train(model, optimizer, 5)
        return model, optimizer, ema

    for saved, match in ((updated, r"99\.7%.*\b5 updates"), (never_updated, "never updated")):
        ema = resume(make, saved, tmp_path / saved.__name__)
        for call in (_swap, ShardedEMA.full_state_dict):
            with pytest.warns(InitialWeightsWarning, match=match):
                call(ema)


@layouts("ddp", "fsdp1", "fsdp1-flat", "fsdp2")
@warnings_as_errors()
def test_weights_loaded_into_a_wrapped_model_are_noticed(layout: str) -> None:
    model = wrap(layout, make_net(layout))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(model)
    handle = ema.attach(optimizer)
    ema.load_state_dict(ema.state_dict())
    state = get_model_state_dict(model)
    set_model_state_dict(model, {name: value.clone() for name, value in state.items()})
    if layout == "ddp":
        model.module.load_state_dict(model.module.state_dict())
    _swap(ema)
    handle.remove()
    train_step(model, optimizer, 0)
    with pytest.raises(InitialWeightsWarning, match="never updated"):
        _swap(ema)


def test_weights_loaded_without_averages_still_count() -> None:
    """The averages began with other weights."""
    model, _, ema = make(attached=True)
    model.load_state_dict(make()[0].state_dict())
    with pytest.warns(InitialWeightsWarning, match=r"never updated.*reset\(\)"):
        ema.full_state_dict()


def test_a_model_with_averages_can_be_copied_and_pickled() -> None:
    model, _, ema = make()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.load_state_dict(model.state_dict())
    ema.full_state_dict()


def test_averages_loaded_as_the_weights_of_a_model(tmp_path: Path) -> None:
    model, optimizer, ema = make(attached=True)
    train(model, optimizer, 5)
    checkpoint.save({"model": model, "ema": ema}, tmp_path, step=5)
    target = make()[0]
    before = target[0].weight.clone()
    with pytest.raises(RuntimeError, match=r"99\.7%.*HalfLife\(1000\)"):
        checkpoint.load({"ema": target}, tmp_path)
    assert torch.equal(target[0].weight, before)
    with pytest.warns(InitialWeightsWarning, match=r"'ema'.*99\.7%") as found:
        checkpoint.load({"ema": target}, tmp_path)
    assert found[0].filename == __file__
