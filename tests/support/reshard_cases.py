"""Pairs of layout and world size: a checkpoint saved on the source must load on the target."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.layouts import IGNORED_WARNINGS

RESHARD_CASES = [
    ("fsdp2", 4, "fsdp2", 2),
    ("fsdp2", 4, "fsdp2", 3),
    ("fsdp2", 2, "fsdp2", 4),
    ("fsdp2", 2, "ddp", 2),
    ("ddp", 2, "fsdp2", 2),
    ("ddp", 3, "ddp", 2),
    ("fsdp1", 2, "fsdp2", 2),
    ("fsdp1-flat", 3, "fsdp2", 2),
    ("fsdp1", 4, "fsdp1-flat", 3),
    ("fsdp2", 3, "fsdp1", 2),
    ("fsdp1-hybrid", 4, "fsdp2", 3),
    ("fsdp1-no-shard", 2, "plain", 1),
    ("hsdp", 4, "fsdp2", 2),
    ("plain", 1, "hsdp", 4),
    ("fsdp2", 2, "plain", 1),
    ("tp", 2, "fsdp2", 3),
    ("fsdp2-tp", 4, "plain", 1),
    ("ddp", 2, "fsdp2-tp", 4),
]

reshard_cases = pytest.mark.parametrize(
    ("source_layout", "source_ranks", "target_layout", "target_ranks"),
    [
        pytest.param(*case, marks=(pytest.mark.world_size(max(case[1], case[3])), *IGNORED_WARNINGS))
        for case in RESHARD_CASES
    ],
)
"""Parametrizes a test on as many ranks as the larger world has."""


def run_in_world(size: int, directory: Path, body: Callable[[], None]) -> None:
    """Run ``body`` on the first ``size`` ranks, in a process group of their own; the other ranks return at once."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    rank = int(os.environ["RANK"])
    if rank < size:
        store = dist.FileStore(str(directory / f"store-of-{body.__name__}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
        body()
        dist.barrier()
        dist.destroy_process_group()
