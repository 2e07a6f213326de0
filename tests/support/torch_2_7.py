"""What torch 2.7, which Composer asks for, cannot do or does otherwise, and how the tests get along with it.

Each of these was seen with torch 2.7.0 and is gone in the torch of `constraints.txt`.
"""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

IS_TORCH_2_7 = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8)

WARNINGS = ("ignore:TypedStorage is deprecated:UserWarning",) if IS_TORCH_2_7 else ()
"""Filters of what DCP warns about in its own code."""

FSDP2_TP_ROWS = 4 if IS_TORCH_2_7 else 6
"""Of a layer cut by FSDP2 over tensor parallelism: it refuses those that four ranks cannot share evenly."""

needs_stable_storage = pytest.mark.skipif(
    IS_TORCH_2_7, reason="FSDP2 in torch 2.7 puts uneven shards into other storage whenever a state is loaded"
)


def apply_workarounds(device: str) -> None:
    """Make this rank's torch do what the tests take for granted."""
    if IS_TORCH_2_7:
        _delay_group_destruction()
        if device == "cpu":
            _average_gradients()


def _delay_group_destruction() -> None:
    """Destroying a process group waits for its threads, and these for the interpreter to free tensors they sent."""
    destroy = dist.destroy_process_group

    def destroy_after_delay(group: ProcessGroup | None = None) -> None:
        time.sleep(0.2)
        destroy(group)

    dist.destroy_process_group = destroy_after_delay


def _average_gradients() -> None:
    """Let FSDP2 train on CPUs as it does elsewhere: it summed gradients over gloo, and under HSDP it failed."""
    collectives: Any = import_module("torch.distributed.fsdp._fully_shard._fsdp_collectives")
    param_group: Any = import_module("torch.distributed.fsdp._fully_shard._fsdp_param_group")
    reduce = collectives.foreach_reduce

    def factors(shards: ProcessGroup, replicas: ProcessGroup | None, *_: object) -> tuple[float, float]:
        return 1.0, shards.size() * (replicas.size() if replicas else 1)  # gloo has no average: sum, and divide after

    def reduce_without_event(*arguments: Any) -> tuple[Any, ...]:  # noqa: ANN401
        *before, _all_reduced, event, partial = reduce(*arguments)
        return *before, None, event, partial  # what was reduced asks for an event, and CPUs have none

    collectives._get_gradient_divide_factors = factors  # noqa: SLF001
    param_group.foreach_reduce = reduce_without_event
