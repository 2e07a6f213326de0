"""Workarounds for torch 2.6, and for torch 2.7, which Composer requires.

Each problem was seen with torch 2.7.0, or 2.6.0 where it says so, and is fixed in the torch of `constraints.txt`.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
IS_BEFORE_TORCH_2_7 = VERSION < (2, 7)
IS_BEFORE_TORCH_2_8 = VERSION < (2, 8)

WARNINGS = (
    *(["ignore:TypedStorage is deprecated:UserWarning"] if VERSION < (2, 13) else ()),  # by DCP, about its own code
    *(
        [
            "ignore:DTensor random operators may not have complete support:UserWarning",
            "ignore:Graph break due to unsupported builtin:UserWarning",
        ]
        if IS_BEFORE_TORCH_2_7
        else ()
    ),
)
"""Filters for warnings that older versions raise about themselves."""

FSDP2_TP_ROWS = 4 if VERSION < (2, 11) else 6
"""Rows of a layer under FSDP2 and tensor parallelism together.

torch 2.7 refuses an uneven split over four ranks. We refuse it up to torch 2.10: torch 2.9 gathers it incorrectly.
"""

needs_stable_storage = pytest.mark.skipif(
    IS_BEFORE_TORCH_2_8, reason="FSDP2 in torch 2.7 moves uneven shards to new storage whenever a state dict is loaded"
)


def apply_workarounds(device: str) -> None:
    """Patch torch in this rank as the tests need it."""
    if IS_BEFORE_TORCH_2_8:
        _delay_group_destruction()
        if device == "cpu":
            _average_gradients()
    if IS_BEFORE_TORCH_2_7 and device == "cpu":
        _let_fsdp2_train()


def _delay_group_destruction() -> None:
    """Delay `destroy_process_group`: it waits for threads that need the interpreter to free the tensors they sent."""
    destroy = dist.destroy_process_group

    def destroy_after_delay(group: ProcessGroup | None = None) -> None:
        time.sleep(0.2)
        destroy(group)

    dist.destroy_process_group = destroy_after_delay


def _let_fsdp2_train() -> None:
    """Make FSDP2 of torch 2.6 train on CPUs: CPU streams lack methods, and autograd sees the all-gather as a write."""

    def do_nothing(*_: object) -> None:
        pass

    stream: Any = torch.cpu.Stream
    stream.record_event = stream.wait_event = do_nothing
    param_group: Any = import_module("torch.distributed.fsdp._fully_shard._fsdp_param_group")
    copy_out = param_group.foreach_all_gather_copy_out

    def copy_out_of_old_versions(gathered: object, params: list[Any], group: ProcessGroup) -> None:
        with ExitStack() as stack:  # as later versions do
            for output in [output for param in params for output in param.all_gather_outputs]:
                stack.enter_context(torch.autograd._unsafe_preserve_version_counter(output))  # noqa: SLF001
            copy_out(gathered, params, group)

    param_group.foreach_all_gather_copy_out = copy_out_of_old_versions


def _average_gradients() -> None:
    """Make FSDP2 average gradients on CPUs: over gloo it summed them, and under HSDP it failed."""
    collectives: Any = import_module("torch.distributed.fsdp._fully_shard._fsdp_collectives")
    param_group: Any = import_module("torch.distributed.fsdp._fully_shard._fsdp_param_group")
    reduce = collectives.foreach_reduce

    def factors(shards: ProcessGroup, replicas: ProcessGroup | None, *_: object) -> tuple[float, float]:
        return 1.0, shards.size() * (replicas.size() if replicas else 1)  # gloo cannot average: sum first, then divide

    def reduce_without_event(*arguments: Any) -> tuple[Any, ...]:  # noqa: ANN401
        *before, _all_reduced, event, partial = reduce(*arguments)
        return *before, None, event, partial  # FSDP2 would record an event on it, and CPUs have none

    collectives._get_gradient_divide_factors = factors  # noqa: SLF001
    param_group.foreach_reduce = reduce_without_event
