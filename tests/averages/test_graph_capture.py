"""No call is recorded into a CUDA graph: it would not happen now, and replays would repeat it without counting it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from ema_dist import ShardedEMA
from ema_dist.averages import side_streams
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


class CapturingDevice:
    """Stands for ``torch.cuda`` while a graph is captured, or not."""

    def __init__(self) -> None:
        self.is_capturing = False
        self.questions = 0

    Stream = None

    def is_current_stream_capturing(self) -> bool:
        self.questions += 1
        return self.is_capturing


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CapturingDevice:
    """The device of every tensor."""
    device = CapturingDevice()
    monkeypatch.setattr(side_streams, "module_with_streams", lambda _: device)
    return device


def written_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for tensor in (*model.parameters(), model[1].running_mean):
        nn.init.ones_(tensor)
    return model


def enter(block: Callable[[ShardedEMA], Any]) -> Callable[[ShardedEMA], object]:
    return lambda ema: block(ema).__enter__()


CALLS: dict[str, Callable[[ShardedEMA], object]] = {
    "update()": ShardedEMA.update,
    "reset()": ShardedEMA.reset,
    "state_dict()": ShardedEMA.state_dict,
    "load_state_dict()": lambda ema: ema.load_state_dict({}),
    "load_full_state_dict()": lambda ema: ema.load_full_state_dict({}),
    "full_state_dict()": ShardedEMA.full_state_dict,
    "copy_to()": lambda ema: ema.copy_to(written_model()),
    "swapped()": enter(ShardedEMA.swapped),
    "serving()": enter(ShardedEMA.serving),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_refused_while_the_stream_is_captured(name: str, device: CapturingDevice) -> None:
    """Before anything has changed; afterwards the same averages can be used."""
    model = written_model()
    ema = ShardedEMA(model, decay=0.5)
    nn.init.zeros_(model[0].weight)
    averages, live = deepcopy(ema.state_dict()), deepcopy(model.state_dict())
    device.is_capturing = True
    with pytest.raises(RuntimeError, match=rf"{name[:-2]}.*captures a CUDA graph.*update\(\) after each replay"):
        CALLS[name](ema)
    device.is_capturing = False
    assert_bitwise_equal(model.state_dict(), live)
    assert_bitwise_equal(ema.state_dict()["tracks"]["default"]["averages"], averages["tracks"]["default"]["averages"])
    ema.update()
    assert (ema.steps, ema.full_state_dict()["0.weight"].unique().item()) == (1, 0.5)


def test_a_captured_step_of_an_attached_optimizer_is_refused(device: CapturingDevice) -> None:
    model = written_model()
    ema = ShardedEMA(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = ema.attach(optimizer)
    device.is_capturing = True
    with pytest.raises(RuntimeError, match=r"update\(\) while.*captures a CUDA graph.*without attach\(\)"):
        optimizer.step()
    device.is_capturing = False
    handle.remove()
    ema.update()
    assert ema.steps == 1


def test_a_swap_cannot_be_left_during_a_capture(device: CapturingDevice) -> None:
    """The averages stay in the model until restore()."""
    model = written_model()
    ema = ShardedEMA(model, decay=0.5)
    nn.init.zeros_(model[0].weight)
    block = ema.swapped()
    block.__enter__()
    device.is_capturing = True
    with pytest.raises(RuntimeError, match=r"leaving swapped\(\).*captures a CUDA graph"):
        block.__exit__(None, None, None)
    device.is_capturing = False
    assert model[0].weight.unique().item() == 1
    ema.restore()
    assert model[0].weight.unique().item() == 0


def test_an_update_asks_once(device: CapturingDevice) -> None:
    """And not at all where weights are on the CPU."""
    ema = ShardedEMA(written_model())
    device.questions = 0
    ema.update()
    assert device.questions == 1
