"""Tensors that this rank holds in full: those of a plain model, of DDP, and buffers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor import ShardedTensor  # no public name
from torch.distributed.tensor import DTensor

from ema_dist.sharding.shard import Shard


class PlainShard(Shard):
    """The full tensor, on this rank."""

    @property
    def shape(self) -> torch.Size:
        return self.local.shape

    @property
    def communication_device(self) -> torch.device:
        return self.local.device

    @property
    def gather_ranks(self) -> frozenset[int]:
        return frozenset()

    @property
    def gather_group(self) -> ProcessGroup | None:
        return None

    def wrap(self, local: Tensor) -> Tensor:
        return local

    def unwrap(self, value: Tensor) -> Tensor:
        if isinstance(value, (DTensor, ShardedTensor)):
            raise ValueError(f"expected a plain tensor, got this rank's part of one ({type(value).__name__})")
        return self.slice_full(value)

    def full(self, local: Tensor) -> Tensor:
        return local

    def slice_full(self, full: Tensor) -> Tensor:
        if full.shape != self.shape:
            raise ValueError(f"expected {tuple(self.shape)}, got {tuple(full.shape)}")
        return full

    @property
    def summary(self) -> str:
        return "whole" if self.replica_group is None else f"whole on each of {self.replica_group.size()} ranks"

    def sharding_key(self) -> tuple[object, ...]:
        return (tuple(self.shape),)

    @property
    def sharding_text(self) -> str:
        return f"{tuple(self.shape)}, whole"
