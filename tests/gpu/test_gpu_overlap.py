"""Updates on a side stream that is late: averages equal those of updates in order, whatever runs meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ema_dist import Offloaded, ShardedEMA, Stochastic
from ema_dist.averages.side_streams import SideStreams
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING

WIDTH = 512


def plain(net: nn.Sequential) -> nn.Module:
    return net


def fsdp2(net: nn.Sequential, **settings: Any) -> nn.Module:  # noqa: ANN401
    mesh = init_device_mesh("cuda", (1,))
    for child in net:
        fully_shard(child, mesh=mesh, **settings)
    return fully_shard(net, mesh=mesh, **settings)  # pyrefly: ignore[bad-return]


@contextmanager
def late_side_streams() -> Iterator[None]:
    """Work on a side stream begins some milliseconds after it may."""
    fork = SideStreams.fork

    @contextmanager
    def late_fork(self: SideStreams, inputs: Iterable[object] = ()) -> Iterator[None]:
        with fork(self, inputs):
            torch.cuda._sleep(10_000_000)  # noqa: SLF001  no public name
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SideStreams, "fork", late_fork)
        yield


def run(
    wrap: Callable[[nn.Sequential], nn.Module],
    *,
    optimizer: str = "fused",
    scaled: bool = False,
    accumulate: int = 1,
    compiled: bool = False,
    wait: bool = True,
    **settings: Any,  # noqa: ANN401
) -> tuple[ShardedEMA, ShardedEMA]:
    """Two averages of one model after eight steps: one that overlaps, and one in order."""
    torch.manual_seed(0)
    model = wrap(nn.Sequential(*(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(4))).cuda())
    adam = torch.optim.AdamW(model.parameters(), lr=0.01, **{optimizer: True})
    overlapping, in_order = (ShardedEMA(model, decay=0.9, **settings) for _ in range(2))
    in_order.attach(adam)
    overlapping.attach(adam, overlap=True)
    if compiled:
        adam.step = torch.compile(adam.step, backend="aot_eager")
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0, enabled=scaled)
    with late_side_streams(), pytest.MonkeyPatch.context() as patch:
        if not wait:
            patch.setattr(SideStreams, "join", lambda _: None)
        for _ in range(8):
            for _ in range(accumulate):
                loss = model(torch.randn(16, WIDTH, device="cuda")).square().mean()
                scaler.scale(loss).backward()
            scaler.step(adam)
            scaler.update()
            adam.zero_grad()
    return overlapping, in_order


CASES = {
    "plain, foreach": (plain, {"optimizer": "foreach"}),
    "plain, scaled": (plain, {"scaled": True}),
    "fsdp2, scaled": (fsdp2, {"scaled": True}),
    "plain, compiled step": (plain, {"optimizer": "foreach", "compiled": True}),
    "fsdp2, accumulated": (fsdp2, {"accumulate": 3}),
    "fsdp2, not resharded": (partial(fsdp2, reshard_after_forward=False), {}),
} | {
    f"{wrap.__name__}, {name}": (wrap, settings)
    for wrap in (plain, fsdp2)
    for name, settings in {
        "default": {},
        "offloaded": {"store": Offloaded(max_pending=2)},
        "bfloat16": {"dtype": torch.bfloat16, "rounding": Stochastic(3)},
    }.items()
}


@pytest.mark.gpu
@pytest.mark.world_size(1)
@pytest.mark.parametrize(("wrap", "settings"), CASES.values(), ids=CASES)
def test_averages_of_late_updates_are_those_in_order(wrap: Callable[..., nn.Module], settings: dict[str, Any]) -> None:
    overlapping, in_order = run(wrap, **settings)
    assert (overlapping.steps, overlapping.updates) == (in_order.steps, in_order.updates) == (8, 8)
    expected = in_order.full_state_dict(dtype=torch.float32)
    assert_bitwise_equal(overlapping.full_state_dict(dtype=torch.float32), expected)


@pytest.mark.gpu
@pytest.mark.world_size(1)
def test_without_the_wait_they_differ() -> None:
    """Otherwise the test above would show nothing."""
    overlapping, in_order = run(plain, wait=False)
    torch.cuda.synchronize()
    actual, expected = (ema.full_state_dict() for ema in (overlapping, in_order))
    assert any(not torch.equal(actual[name], value) for name, value in expected.items())
