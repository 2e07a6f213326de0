"""Tensors that this rank holds whole: a plain model's, DDP's, and every buffer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.shards.shard import Shard


class WholeShard(Shard):
    """The whole tensor, on this rank."""

    @property
    def shape(self) -> torch.Size:
        return self.local.shape

    @property
    def device(self) -> torch.device:
        return self.local.device

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset()

    @property
    def group(self) -> ProcessGroup | None:
        return None

    def wrap(self, local: Tensor) -> Tensor:
        return local

    def unwrap(self, value: Tensor) -> Tensor:
        return self.cut(value)

    def full(self, local: Tensor) -> Tensor:
        return local

    def cut(self, full: Tensor) -> Tensor:
        if full.shape != self.shape:
            raise ValueError(f"expected {tuple(self.shape)}, got {tuple(full.shape)}")
        return full

    def describe(self) -> str:
        return f"{tuple(self.shape)}, whole"
