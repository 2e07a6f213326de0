"""Whatever interrupts a swap, once `restore` returns, live weights and averages are bit-identical to what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ema_dist import Compensated, ShardedEMA
from ema_dist.kernels import scratch
from tests.support.interrupter import Interrupter

WRITING = ("evaluation/swap.py", "evaluation/model_with_averages.py", "kernels/exchange.py")
"""The modules that write to the model or to the journal; what they call has no effect that remains."""


class _Net(nn.Module):
    """Tensors of two dtypes, of which one takes several scratches, and buffers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.randn(20, 5).to(dtype))
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("count", torch.tensor(7))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": nn.Module.train,
    "ddp": DistributedDataParallel,
    "fsdp2": fully_shard,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "equal dtypes": {},
    "different dtypes": {},
    "hi/lo": {"dtype": torch.bfloat16, "rounding": Compensated()},
    "two tracks": {"decay": {"a": 0.5, "b": 0.25}},
}


@pytest.mark.world_size(1)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_exception_at_any_bytecode_loses_nothing(
    wrapper: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entering, leaving and restoring, and again while the first interruption is being handled.

    At each bytecode of the plain model; wrapped ones differ in how they are read, so every fifth has to do.
    """
    monkeypatch.setattr(scratch, "CPU_SCRATCH_BYTES", 256)
    torch.manual_seed(0)
    model = WRAPPERS[wrapper](_Net(torch.float32 if setting in ("equal dtypes", "two tracks") else torch.bfloat16))
    ema = ShardedEMA(model, **{"decay": 0.5} | SETTINGS[setting])
    with torch.no_grad():
        for tensor in (*model.parameters(), model.get_buffer("mean") if wrapper != "ddp" else model.module.mean):
            tensor.add_(1)
    ema.update()
    track = ema.tracks[-1]
    live, averages = _live(model), _averages(ema)

    def swap() -> None:
        with ema.swapped(track):
            pass

    counter = Interrupter(WRITING)
    counter.run(swap)
    for point in range(1, counter.count + 1, 1 if wrapper == "plain" else 5):
        second = Interrupter(WRITING, point, point + 1 + (point * 7919) % 100)
        second.run(swap)
        Interrupter(WRITING, (point * 104729) % 100 + 1).run(ema.restore)
        ema.restore()
        _assert_same(_live(model), live, point)
        if point % 10 == 0:
            _assert_same(_averages(ema), averages, point)
            with ema.swapped(track):
                pass
            _assert_same(_live(model), live, point)
    _assert_same(_averages(ema), averages, counter.count)
    ema.update()


def _live(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.to_local() if hasattr(value, "to_local") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def _averages(ema: ShardedEMA) -> dict[str, Tensor]:
    return {
        f"{track} {name}": value
        for track in ema.tracks
        for name, value in ema.full_state_dict(track=track, dtype=torch.float64).items()
    }


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], point: int) -> None:
    assert [n for n, value in expected.items() if not torch.equal(actual[n], value)] == [], f"bytecode {point}"
