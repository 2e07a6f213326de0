"""Tensors that this rank holds in full: tensors of a plain model or DDP, buffers, and expanded tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor import ShardedTensor  # no public name
from torch.distributed.tensor import DTensor

from ema_dist.sharding.memory import distinct_elements, has_equal_bits
from ema_dist.sharding.shard import CopyFunction, Shard


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
            raise ValueError(f"expected a full plain tensor, got a sharded tensor ({type(value).__name__})")
        return self.slice_full(value)

    def full(self, local: Tensor, copy_local: CopyFunction = Tensor.copy_) -> Tensor:  # noqa: ARG002
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
        return f"a full tensor of shape {tuple(self.shape)}"


class ExpandedShard(PlainShard):
    """A tensor made by `Tensor.expand`: ``local`` has its distinct elements, one along each of the expanded ``dims``.

    The full tensor and the tensor that DCP saves have all elements. Replicas do not split it.
    """

    def __init__(self, names: tuple[str, ...], local: Tensor, owner: Tensor, *, dims: tuple[int, ...]) -> None:
        super().__init__(names, local, owner)
        self.dims = dims
        self._shape = self.owner.shape

    @property
    def shape(self) -> torch.Size:
        return self._shape

    def wrap(self, local: Tensor) -> Tensor:
        return local.expand(self._shape).contiguous()  # DCP cannot read into elements that share memory

    def wrap_for_forward(self, local: Tensor) -> Tensor:
        return local.expand(self._shape)

    def full(self, local: Tensor, copy_local: CopyFunction = Tensor.copy_) -> Tensor:  # noqa: ARG002
        return local.expand(self._shape)

    def slice_full(self, full: Tensor) -> Tensor:
        distinct = distinct_elements(super().slice_full(full), self.dims)
        expanded = distinct.expand(self._shape)
        if not has_equal_bits(expanded, full):
            raise ValueError(f"expected equal values along the expanded dimensions {list(self.dims)}, got unequal ones")
        return distinct

    def local_state(self, state: Tensor) -> None:  # noqa: ARG002  torch cannot step an expanded parameter
        return None

    @property
    def summary(self) -> str:
        return "expanded"

    def sharding_key(self) -> tuple[object, ...]:
        return *super().sharding_key(), self.dims

    @property
    def sharding_text(self) -> str:
        return f"{super().sharding_text}, expanded along dimensions {list(self.dims)}"
