"""Tensors made by `expand` are kept by their distinct elements, and have their full shape in every state dict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ema_dist import ShardedEMA, checkpoint
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


class Expanded(nn.Module):
    """Expanded buffers of several kinds, and an expanded parameter."""

    def __init__(self, *, has_parameter: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 2)
        self.register_buffer("eye", torch.eye(2).expand(3, 2, 2))
        self.register_buffer("inner", torch.randn(2, 1, 3).expand(2, 4, 3))
        self.register_buffer("nan", torch.full((1,), torch.nan).expand(5))
        self.register_buffer("counts", torch.tensor(3).expand(2, 2))
        self.register_buffer("narrow", torch.randn(1, 2, dtype=torch.bfloat16).expand(3, 2))
        if has_parameter:
            self.gate = nn.Parameter(torch.ones(1).expand(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.eye.sum() + self.inner.sum()


def plain_expanded() -> nn.Module:
    return Expanded()


def ddp_expanded() -> nn.Module:
    """DDP refuses to broadcast expanded tensors, so it must ignore them."""
    model = Expanded()
    ignored = [name for name in model.state_dict() if not name.startswith("linear")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # noqa: SLF001  no public name
    return DistributedDataParallel(model)


def fsdp2_expanded() -> nn.Module:
    """FSDP2 refuses expanded parameters."""
    return fully_shard(Expanded(has_parameter=False))


@torch.no_grad()
def write_expanded(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        distinct = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        for dim, stride in enumerate(distinct.stride()):
            distinct = distinct.narrow(dim, 0, 1) if stride == 0 else distinct
        distinct.mul_(2)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): (value.full_tensor() if isinstance(value, DTensor) else value).clone().double()
        for name, value in model.state_dict().items()
    }


def assert_equal_with_nan(actual: dict[str, Any], expected: dict[str, Any], rtol: float = 0) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "settings", [{}, {"decay": {"a": 0.5, "b": 0.9}}, {"buffers": "copy"}], ids=["", "two", "copy"]
)
@pytest.mark.parametrize("make", [plain_expanded, ddp_expanded, fsdp2_expanded])
def test_expanded_tensors_are_kept_by_their_distinct_elements(
    make: Callable[[], nn.Module], settings: dict[str, Any], tmp_path: Path
) -> None:
    """In full shape wherever the unwrapped model's `state_dict()` has them so."""
    model = make()
    ema = ShardedEMA(model, **{"decay": 0.5} | settings)
    track = ema.tracks[0]
    before = gathered(model)
    write_expanded(model)
    ema.update()
    live = gathered(model)
    is_averaged = {
        name
        for name in live
        if name.startswith("linear") or (name not in ("counts", "gate") and not settings.get("buffers"))
    }
    expected = {name: (before[name] + live[name]) / 2 if name in is_averaged else live[name] for name in live}
    with ema.swapped(track):
        inside = gathered(model)
    assert_equal_with_nan(gathered(model), live)
    assert_equal_with_nan(inside, expected, rtol=4e-3)
    x = torch.ones(1, 2)
    with torch.no_grad(), ema.swapped(track):
        output = model(x)
    with ema.serving(track):
        assert torch.equal(model(x), output)
    assert_equal_with_nan(gathered(model), live)
    full = ema.full_state_dict(track=track)
    net = Expanded(has_parameter="gate" in live)
    if full:
        assert_equal_with_nan(full, expected, rtol=4e-3)
        assert all(value.is_contiguous() for value in full.values())
        assert {name: value.shape for name, value in full.items()} == {k: v.shape for k, v in net.state_dict().items()}
        assert ema.full_shapes()["inner"].shape == (2, 4, 3)
    for other in (net, make()):
        ema.copy_to(other, track=track)
        assert_equal_with_nan(gathered(other), expected, rtol=4e-3)
    state = {"model": model, "ema": ema}
    if make is not plain_expanded:
        checkpoint.save(state, tmp_path, step=1)
        write_expanded(model)
        ema.update()
        checkpoint.load(state, tmp_path)
        assert_equal_with_nan(gathered(model), live)
        assert_equal_with_nan(ema.full_state_dict(track=track), {k: v.double() for k, v in full.items()})
    ema.load_full_state_dict(full, track=track)
    assert_equal_with_nan(ema.full_state_dict(track=track), {k: v.double() for k, v in full.items()})
    if full:
        full["inner"][1, 2, 0] += 1
    with pytest.raises(ValueError, match="inner"):
        ema.load_full_state_dict(full, track=track)


def test_values_that_an_expanded_tensor_cannot_hold_are_refused_before_anything_changes() -> None:
    model, given = Expanded(), Expanded()
    model.inner = torch.randn(2, 4, 3)
    before = gathered(given)
    with pytest.raises(ValueError, match="inner"):
        ShardedEMA(model).copy_to(given)
    assert_equal_with_nan(gathered(given), before)
    state = ShardedEMA(given).state_dict()
    state["tracks"]["default"]["buffers"]["inner"][1, 2, 0] += 1
    with pytest.raises(ValueError, match="inner"):
        ShardedEMA(given).load_state_dict(state)


@pytest.mark.parametrize("value", [torch.zeros(3, 2, 2), torch.zeros(1, 2, 2).expand(2, 2, 2)])
def test_a_buffer_that_is_no_longer_expanded_alike_is_an_error(value: Tensor) -> None:
    model = Expanded()
    ema = ShardedEMA(model)
    model.eye = value
    with pytest.raises(ValueError, match=r"eye.*expanded"):
        ema.update()
