"""What a model and its averages may become between two stays in `serving`, and what a stay leaves behind."""

from __future__ import annotations

import copy
import sys
import threading
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from ema_dist import ShardedEMA
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    assert_bitwise_equal,
    evaluate,
    full_weights,
    layouts,
    make_trained,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


class Codebook(nn.Module):
    """Puts another buffer in the place of its own at each forward pass in training."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count = self.count + 1
        return self.inner(x)


def test_buffers_replaced_between_serving_blocks_are_kept() -> None:
    model = Codebook()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, decay=0.5)
    for step in range(4):
        model(torch.ones(1, 2)).sum().backward()
        with ema.serving():
            model(torch.ones(1, 2))  # what it writes is dropped
            assert model.state_dict()["count"] == step + 1
        optimizer.step()
        ema.update()
        assert model.count == step + 1


@pytest.mark.parametrize("call", ["serving", "swapped", "state_dict"])
def test_buffers_are_followed_also_after_a_call_that_found_another_model(call: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    ema = ShardedEMA(model, decay=0.5)
    model[1].running_mean = torch.zeros(2)
    model[0].weight, original = nn.Parameter(torch.ones(3, 2)), model[0].weight
    with pytest.raises(ValueError, match=r"\b0\.weight\b.*\(2, 2\).*\(3, 2\)"), ExitStack() as stack:
        result = getattr(ema, call)()
        stack.enter_context(result)
    model[0].weight = original
    model[1].running_mean.fill_(8)
    ema.update()
    assert ema.full_state_dict()["1.running_mean"].tolist() == [4, 4]


def test_modules_that_share_their_registries_hold_the_live_weights_in_state_dicts() -> None:
    first = nn.Linear(2, 2)
    model = nn.Sequential(first, copy.copy(first))
    ema = ShardedEMA(model, decay=0.5)
    with torch.no_grad():
        first.weight.fill_(1)
    live = full_weights(model)
    with ema.serving():
        assert_bitwise_equal(full_weights(model), live)
        assert not torch.equal(model[1].weight, live["1.weight"])


@layouts("plain", "fsdp2")
def test_parameters_assigned_between_serving_blocks_are_trained(layout: str) -> None:
    """Loaded with ``assign=True`` they are other objects in the same storage."""
    model, ema = make_trained(layout, replicas="copy")
    with ema.serving():
        pass
    state = model.state_dict()
    model.load_state_dict(state, assign=True)
    model.head.weight = model.embed.weight  # which were tied
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    handle = ema.attach(optimizer)
    with ema.serving():
        evaluate(model)
    assert {*map(id, parameters)} <= {*map(id, model.parameters())}
    before = full_weights(model)
    model.train()
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(before[name], value) for name, value in full_weights(model).items())
    handle.remove()


def test_requires_grad_set_inside_serving_is_dropped() -> None:
    """`requires_grad_` inside reaches what stands in for the parameters, for the time of the block."""
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, decay=0.5)
    with ema.serving():
        model.requires_grad_()
    with ema.serving():
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Frozen(nn.Linear):
    """Lets nobody assign its weight."""

    is_frozen = False

    def __setattr__(self, name: str, value: object) -> None:
        if self.is_frozen and name == "weight":
            raise AttributeError("this layer is frozen")
        super().__setattr__(name, value)


def test_a_module_that_rejects_weights_ends_serving_cleanly() -> None:
    model = nn.Sequential(Frozen(2, 2), nn.Linear(2, 2))
    ema = ShardedEMA(model, decay=0.5)
    live = full_weights(model)
    model[0].__dict__["is_frozen"] = True
    with pytest.raises(AttributeError, match="this layer is frozen"), ema.serving():
        pass
    assert_bitwise_equal(full_weights(model), live)
    ema.update()
    model[0].__dict__["is_frozen"] = False
    with ema.serving():
        evaluate_small(model)
    assert_bitwise_equal(full_weights(model), live)


def evaluate_small(model: nn.Module) -> None:
    with torch.no_grad():
        model(torch.ones(1, 2))


def test_models_are_served_in_several_threads() -> None:
    """Each knows of the others' stays."""
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
            ema = ShardedEMA(model, decay=0.5)
            with torch.no_grad():
                model[0].weight.add_(1)
            live = full_weights(model)
            for _ in range(300):
                with ema.serving():
                    assert_bitwise_equal(full_weights_inside(model), live)
        except BaseException as error:  # noqa: BLE001 - of a thread, for the test to raise
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=serve) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


def full_weights_inside(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.double() for name, value in model.state_dict().items()}


@layouts("plain", "ddp", "fsdp2")
def test_each_track_is_served_by_its_name(layout: str) -> None:
    model, ema = make_trained(layout, decay={"short": 0.5, "long": 0.9})
    for track in ema.tracks:
        with ema.swapped(track):
            expected = evaluate(model)
        with ema.serving(track):
            assert torch.equal(evaluate(model), expected)
    with ema.serving("short"):
        short = evaluate(model)
    with ema.serving("long"):
        assert not torch.equal(evaluate(model), short)
