"""`attach(optimizer)` updates after each real step, and after nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from ema_dist import ShardedEMA
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, layouts, make_net, train_step, wrap

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


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
    with pytest.raises(RuntimeError, match=r"update\(\) was called while an optimizer is attached.*twice.*remove\(\)"):
        ema.update()
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


class AcceleratedOptimizer(torch.optim.Optimizer):
    """As accelerate's: it has the type of an optimizer, and no hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.optimizer, name)

    def step(self, closure: Any = None) -> None:  # noqa: ANN401
        self.optimizer.step(closure)


class _FabricOptimizer:
    """As Fabric's: its type and attributes are made from those of the optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__ = {name: value for name, value in vars(optimizer).items() if name != "step"}
        self.__class__ = type(f"Fabric{type(optimizer).__name__}", (type(self), type(optimizer)), {})
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, closure: Any = None) -> None:  # noqa: ANN401
        self._optimizer.step(closure)


class LightningOptimizer(_FabricOptimizer):
    """As Lightning's."""


AcceleratedOptimizer.__module__ = "accelerate.optimizer"
_FabricOptimizer.__module__ = "lightning_fabric.wrappers"
LightningOptimizer.__module__ = "pytorch_lightning.core.optimizer"


@pytest.mark.parametrize("wrapper", [AcceleratedOptimizer, _FabricOptimizer, LightningOptimizer])
def test_the_optimizer_in_a_known_wrapper_is_attached(wrapper: Any) -> None:  # noqa: ANN401
    model = nn.Linear(2, 2)
    wrapped = wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    ema = ShardedEMA(model)
    ema.attach(wrapped)
    model(torch.ones(1, 2)).sum().backward()
    wrapped.step()
    assert ema.steps == 1


class WithoutInit(torch.optim.Optimizer):
    """An unknown wrapper that never called ``Optimizer.__init__``."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups


def test_attach_rejects_non_optimizers_and_names_the_inner_one() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer.*StepLR.*\bSGD\b.*'optimizer'"):
        ema.attach(scheduler)
    with pytest.raises(ValueError, match=r"WithoutInit.*Optimizer\.__init__\(\).*\bSGD\b.*'inner'"):
        ema.attach(WithoutInit(optimizer))
    with pytest.raises(TypeError, match=r"expected.*\bLinear\b.*update\(\)"):
        ema.attach(model)


def test_attaching_the_optimizer_of_another_model_is_refused() -> None:
    """Of the discriminator, say."""
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer.*averaged parameters.*update\(\)"):
        ShardedEMA(nn.Linear(2, 2)).attach(other)
