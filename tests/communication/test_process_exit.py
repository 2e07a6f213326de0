"""A process that communicates waits at its end for torch's threads."""

from __future__ import annotations

import atexit
import time
from typing import Any

import pytest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ema_dist import ShardedEMA
from ema_dist.communication.process_exit import DELAY, delay_process_exit


@pytest.mark.parametrize("ranks", [pytest.param(count, marks=pytest.mark.world_size(count)) for count in (1, 2)])
def test_processes_of_several_ranks_wait_once(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(atexit, "register", lambda *call: calls.append(call))
    delay_process_exit.cache_clear()
    for _ in range(2):
        model = nn.Linear(2, 2)
        ShardedEMA(DistributedDataParallel(model) if ranks > 1 else model)
    assert calls == [(time.sleep, DELAY)] * (ranks > 1)
