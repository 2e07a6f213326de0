"""An optimizer of any kind resumes as if it had never stopped, or is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer

from ema_dist import ShardedEMA, checkpoint


class Delegating(Optimizer):
    """A launcher's prepared optimizer: all of its state is that of the one inside."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.param_groups = inner.param_groups
        self.state = inner.state

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        self.inner.step()


class Perturbing(Optimizer):
    """Sharpness-aware: it has state of its own beside the moments of the one inside."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, {})
        self.inner = Adam(self.param_groups, lr=0.05)

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.detach().clone()
        self.inner.step()


class Several(Optimizer):
    """Two optimizers as one, with a ``state_dict()`` of its own."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.inner = [Adam(parameters[:1], lr=0.05), Adam(parameters[1:], lr=0.05)]
        super().__init__(parameters, {})

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        for optimizer in self.inner:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"inner": [optimizer.state_dict() for optimizer in self.inner]}


class WithoutInit(Optimizer):
    """Looks ahead; torch has no hooks for it."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        self.inner.step()


class ScheduleFree(Adam):
    """Averages by itself."""

    train_mode = True


def _train(model: nn.Module, optimizer: Any, steps: range) -> None:  # noqa: ANN401
    for step in steps:
        for parameter in model.parameters():
            parameter.grad = None
        model(torch.full((1, 3), float(step))).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make", [lambda p: Adam(p, lr=0.05), lambda p: Delegating(Adam(p, lr=0.05))], ids=["plain", "delegating"]
)
def test_it_resumes_exactly(make: Callable[[Any], Optimizer], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, resumed = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer, other = make([*model.parameters()]), make([*resumed.parameters()])
    _train(model, optimizer, range(3))
    checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=3)
    checkpoint.load({"model": resumed, "optim": other}, tmp_path)
    for each, stepping in ((model, optimizer), (resumed, other)):
        _train(each, stepping, range(3, 6))
    assert torch.equal(model.weight, resumed.weight)


def test_schedules_of_a_wrapper_go_on_after_loading(tmp_path: Path) -> None:
    """They write to the group dictionaries of the optimizer inside."""
    model = nn.Linear(3, 3)
    optimizer = Delegating(Adam(model.parameters(), lr=1.0))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    _train(model, optimizer, range(1))
    checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=1)
    checkpoint.load({"model": model, "optim": optimizer}, tmp_path)
    schedule.step()
    assert [group["lr"] for group in optimizer.inner.param_groups] == [0.5]
    assert optimizer.state is optimizer.inner.state


def test_another_optimizer_in_an_attribute_is_not_taken_for_it(tmp_path: Path) -> None:
    models = nn.Linear(3, 3), nn.Linear(3, 3)
    first, second = (Adam(model.parameters(), lr=0.05) for model in models)
    first.peer = second  # pyrefly: ignore[missing-attribute]
    _train(models[0], first, range(2))
    checkpoint.save({"model": models[0], "optim": first}, tmp_path, step=1)
    assert checkpoint.load({"model": models[0], "optim": first}, tmp_path) == 1


class Counting(Delegating):
    """Has a number beside the state of the optimizer inside."""

    def state_dict(self) -> dict[str, Any]:
        state_dict = self.inner.state_dict()
        return {**state_dict, "param_groups": [{**group, "count": 7} for group in state_dict["param_groups"]]}


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (Perturbing, "optimizer.inner}"),
        (Several, r"optimizer\.inner\[0\].*optimizer\.inner\[1\]"),
        (lambda parameters: WithoutInit(Adam(parameters)), "optimizer.inner}"),
        (lambda parameters: Counting(Adam(parameters)), "optimizer.inner}"),
    ],
    ids=["perturbing", "several", "without init", "counting"],
)
def test_it_is_refused_before_anything_is_written(
    make: Callable[[Any], Optimizer], advice: str, tmp_path: Path
) -> None:
    model = nn.Linear(3, 3)
    optimizer = make([*model.parameters()])
    _train(model, optimizer, range(2))
    with pytest.raises(RuntimeError, match=rf"{type(optimizer).__name__}.*{advice}"):
        checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=1)
    assert not [*tmp_path.iterdir()]


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_states_that_only_one_rank_holds_are_refused(tmp_path: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: PLC0415  importing it warns

    model = DistributedDataParallel(nn.Linear(3, 3))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), Adam, lr=0.1)
    _train(model, optimizer, range(2))
    with pytest.raises(RuntimeError, match=r"ZeroRedundancyOptimizer.*fully_shard"):
        checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=1)


class Quantized(Tensor):
    """Stands for moments and weights that a library stores in types of its own."""


@pytest.mark.parametrize("part", ["moment", "weight"])
def test_tensor_subclasses_are_refused_by_name(part: str, tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = Adam(model.parameters())
    checkpoint.save({"model": model}, tmp_path, step=0)
    _train(model, optimizer, range(1))
    if part == "moment":
        moments = optimizer.state[model.weight]
        moments["exp_avg"] = moments["exp_avg"].as_subclass(Quantized)
    else:
        model.register_buffer("scale", torch.ones(1).as_subclass(Quantized))
    name = "optim.state.weight.exp_avg" if part == "moment" else "model.scale"
    with pytest.raises(RuntimeError, match=f"{name}.*Quantized"):
        checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=1)
    assert checkpoint.latest(tmp_path) == 0


def test_what_cannot_be_read_back_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older checkpoints stay, though only one is to be kept."""
    checkpoint.save({"x": 1}, tmp_path, step=1, keep=1)
    monkeypatch.setattr("ema_dist.checkpoint.values.require_loadable", lambda *_: None)
    with pytest.raises(checkpoint.CheckpointError, match=r"step-0+2.*pathlib"):
        checkpoint.save({"x": Path}, tmp_path, step=2, keep=1)
    state = {"x": 0}
    assert checkpoint.load(state, tmp_path) == 1
    assert state == {"x": 1}


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda parameters: WithoutInit(Adam(parameters)), ValueError),
        (ScheduleFree, ValueError),
        (lambda _: object(), TypeError),
    ],
    ids=["without init", "schedule-free", "object"],
)
def test_attaching_refuses_what_it_cannot_count(make: Callable[[Any], Any], error: type[Exception]) -> None:
    model = nn.Linear(3, 3)
    ema = ShardedEMA(model)
    optimizer = make([*model.parameters()])
    with pytest.raises(error, match=rf"{type(optimizer).__name__}.*update\(\)"):
        ema.attach(optimizer)
