"""What a write to live weights waits for: copies to the device, and FSDP2's event of the optimizer. With fakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ema_dist import ShardedEMA, checkpoint, compute_ema
from ema_dist.sharding import Layout
from ema_dist.sharding.plain_shard import PlainShard
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, make_net, wrap

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


DEVICE = torch.device("cuda", 3)


def copy_to(model: nn.Module, _: Path) -> None:
    ShardedEMA(nn.Linear(2, 2)).copy_to(model)


def average(model: nn.Module, _: Path) -> None:
    compute_ema(nn.Linear(2, 2), model)


def load(model: nn.Module, root: Path) -> None:
    checkpoint.load({"model": model}, root)


@pytest.mark.parametrize("is_offloaded", [True, False])
@pytest.mark.parametrize("write", [copy_to, average, load])
def test_a_device_that_may_still_copy_weights_is_waited_for_before_they_are_written_to(
    write: Callable[[nn.Module, Path], None],
    is_offloaded: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    checkpoint.save({"model": nn.Linear(2, 2)}, tmp_path, step=1)
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    waits: list[tuple[torch.device, bool]] = []

    def synchronize(device: torch.device) -> None:
        waits.append((device, torch.equal(model.weight, before)))

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    if is_offloaded:
        monkeypatch.setattr(PlainShard, "communication_device", property(lambda _: DEVICE))
    write(model, tmp_path)
    assert waits == ([(DEVICE, True)] if is_offloaded else [])
    assert not torch.equal(model.weight, before)


class Event:
    """An event of an optimizer, as FSDP2 is given it."""

    def __init__(self) -> None:
        self.waits = 0

    def wait(self) -> None:
        """The current stream waits for the event."""
        self.waits += 1


@pytest.mark.world_size(2)
def test_the_optimizers_event_is_waited_for_and_cleared_by_swaps() -> None:
    """FSDP2 would gather as soon as it has passed, and read shards to which the swap still writes."""
    model = wrap("fsdp2", make_net("fsdp2"))
    assert isinstance(model, FSDPModule)
    ema = ShardedEMA(model, decay=0.5)
    model(torch.ones(4, 6)).sum().backward()
    context = model._get_fsdp_state()._state_ctx  # noqa: SLF001  no public way to read it
    on_entering, on_leaving, in_serving = Event(), Event(), Event()
    model.set_post_optim_event(on_entering)
    with ema.swapped():
        assert (context.post_optim_event, on_entering.waits) == (None, 1)
        model.set_post_optim_event(on_leaving)
    assert (context.post_optim_event, on_leaving.waits) == (None, 1)
    model.set_post_optim_event(in_serving)
    with ema.serving():
        assert context.post_optim_event is None
    # Serving writes to no live weight: the next pass of training may overlap as before.
    assert (context.post_optim_event, in_serving.waits) == (in_serving, 0)
    Layout(model)
    assert (context.post_optim_event, in_serving.waits) == (None, 1)
