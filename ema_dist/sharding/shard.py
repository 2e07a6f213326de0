"""The part of one tensor that this rank holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from copy import copy

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

CopyFunction = Callable[[Tensor, Tensor], object]
"""Copies the second tensor to the first."""


class Shard(ABC):
    """The part of one tensor that this rank holds, and how to wrap, gather and slice it.

    Args:
        names: canonical names (as in the unwrapped model's ``state_dict()``); several if the tensor is tied.
        local: this rank's plain tensor, detached: the model's own storage, not a copy.
        owner: the parameter or buffer that ``named_parameters()`` or ``named_buffers()`` returns for it.
        replica_group: the ranks that hold an identical ``local``, including this one; None if there are no others.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        local: Tensor,
        owner: Tensor,
        *,
        replica_group: ProcessGroup | None = None,
    ) -> None:
        self.names = names
        self.local = local
        self.owner = owner
        self.owner_name: str = names[0]
        """The first name under which modules hold `owner`."""
        self.other_owners: dict[str, Tensor] = {}
        """The other objects that share all memory of the owner (``assign=True``, ``.data =``), by their first names."""
        self.replica_group = replica_group
        self.averaged_part: Shard = self
        """The part of ``local`` that this rank averages: all of it, or its share of the rows if replicas split it."""
        self.padded_numel: int = local.numel()
        """Elements, including padding, of a tensor that the wrapper can gather in place of ``local``."""
        self.owner_offset: int | None = None
        """The offset of ``local`` in an owner that holds the elements of several tensors (a flat parameter)."""

    @property
    def name(self) -> str:
        """The first canonical name."""
        return self.names[0]

    @property
    def owners(self) -> dict[str, Tensor]:
        """The parameters or buffers that modules hold for this tensor: every object once, by its first name."""
        return {self.owner_name: self.owner, **self.other_owners}

    @property
    def is_split(self) -> bool:
        """Whether this rank averages only a part of what it holds."""
        return self.averaged_part is not self

    @property
    def version(self) -> tuple[object, ...]:
        """Changes when the parameter is written to in place, is cast, or gets other storage."""
        return *self.owner_versions.values(), self.local.data_ptr(), self.local.dtype

    @property
    def owner_versions(self) -> dict[int, int]:
        """The version of each owner by its id: changes when the parameter is written to in place, or replaced."""
        # Autograd's version counter has no public name.
        return {id(owner): owner._version for owner in (self.owner, *self.other_owners.values())}

    def increment_other_versions(self) -> None:
        """Tell autograd that `other_owners` were written to, after a write through ``local``.

        Each of them counts versions on its own. A graph that saved one of them must not run backward after the write.
        """
        for owner in self.other_owners.values():
            torch.autograd.graph.increment_version(owner)

    def empty_local(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """A new tensor like ``local``, in storage of `padded_numel` elements; the padding is zero."""
        if self.padded_numel == self.local.numel():
            return torch.empty_like(self.local, dtype=dtype, device=device)
        storage = self.local.new_zeros(self.padded_numel, dtype=dtype or self.local.dtype, device=device)
        return storage[: self.local.numel()].view(self.local.shape)

    def with_empty_local(self) -> Shard:
        """A shard like this one whose ``local`` is a new tensor; the ``averaged_part`` is the same part of it."""
        new_shard = copy(self)
        new_shard.local = new_shard.owner = self.empty_local()
        new_shard.averaged_part = new_shard
        if self.is_split:
            new_shard.averaged_part = copy(self.averaged_part)
            begin = self.averaged_part.local.storage_offset() - self.local.storage_offset()
            start = new_shard.local.storage_offset() + begin
            new_shard.averaged_part.local = new_shard.local.as_strided(
                self.averaged_part.local.shape, self.averaged_part.local.stride(), start
            )
        return new_shard

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the full tensor."""

    @property
    def global_offset(self) -> int:
        """The offset of ``local`` in the concatenated parts of all ranks (the full tensor, if the parts are rows)."""
        return 0

    @property
    @abstractmethod
    def communication_device(self) -> torch.device:
        """The device, with its index, on which ranks gather this tensor; ``local`` may be offloaded from it."""

    @property
    @abstractmethod
    def gather_ranks(self) -> frozenset[int]:
        """Global ranks that must call `full` together; empty if it does not communicate."""

    @property
    @abstractmethod
    def gather_group(self) -> ProcessGroup | None:
        """The process group of exactly `gather_ranks`; None if there is none."""

    @abstractmethod
    def wrap(self, local: Tensor) -> Tensor:
        """``local`` wrapped as its owner is, so that DCP saves and reshards it, and can read into it.

        It shares storage with ``local`` where possible; otherwise `unwrap` returns a tensor to copy from.

        Shape: ``local`` has the shape of ``self.local``; the result has ``self.shape``.
        """

    def wrap_for_forward(self, local: Tensor) -> Tensor:
        """``local`` wrapped as its owner is, always sharing storage with ``local``, to compute with."""
        return self.wrap(local)

    @abstractmethod
    def unwrap(self, value: Tensor) -> Tensor:
        """This rank's plain tensor inside a wrapped ``value``, or its part of a full plain ``value``.

        Raises: ValueError when ``value`` has another shape, is sharded differently, or differs along dimensions in
            which the owner is expanded.
        """

    @abstractmethod
    def full(self, local: Tensor, copy_local: CopyFunction = Tensor.copy_) -> Tensor:
        """The full tensor whose parts the ranks pass as ``local``; it may share storage with ``local``.

        Args:
            copy_local: copies ``local`` to `communication_device` if it is offloaded from there.

        Collective: over `gather_ranks`. Memory: two full tensors at most, while gathering.
        """

    @abstractmethod
    def slice_full(self, full: Tensor) -> Tensor:
        """This rank's part of a full plain tensor: a view of it where possible.

        Raises: as `unwrap`.
        """

    def local_state(self, state: Tensor) -> Tensor | None:
        """This rank's part of an optimizer state tensor of the owner, such as a moment; a view of it.

        Returns: None for a tensor that is not sharded as the owner is, such as a step count.
        """
        if state.shape != self.owner.shape:
            return None
        if self.owner_offset is not None:
            start = state.storage_offset() + self.owner_offset
            return state.detach().as_strided(self.local.shape, self.local.stride(), start)
        return state.detach() if state.shape == self.local.shape else None

    def is_sharded_like(self, other: Shard) -> bool:
        """Whether both hold the same part of tensors of the same shape, on every rank."""
        return self.sharding_key() == other.sharding_key()

    @property
    @abstractmethod
    def summary(self) -> str:
        """How the tensor is sharded and replicated, in a few words for messages."""

    @abstractmethod
    def sharding_key(self) -> tuple[object, ...]:
        """The shape of the full tensor and everything that decides which part of it each rank holds.

        Compared for equality, tensor by tensor, so it must not be built from all ranks each time.
        """

    @property
    @abstractmethod
    def sharding_text(self) -> str:
        """The shape, sharding and ranks, for messages about two shards that differ; other messages use `summary`."""


def memory_order(shape: Iterable[int], stride: Iterable[int]) -> list[int] | None:
    """Dimensions from the outermost to the innermost in memory; None for a tensor with gaps or overlaps."""
    extents = list(zip(shape, stride, strict=True))
    order = sorted(range(len(extents)), key=lambda dim: (extents[dim][0] != 1, -extents[dim][1], dim))
    expected = 1
    for dim in reversed(order):
        size, step = extents[dim]
        if size != 1 and step != expected:
            return None
        expected *= size
    return order


def flat_view(tensor: Tensor) -> Tensor:
    """A 1-D view of a dense tensor in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,))


def has_contiguous_rows(tensor: Tensor) -> bool:
    """Whether chunks of rows are contiguous in memory: a dense tensor whose first dimension is outermost."""
    if tensor.dim() and tensor.numel() and tensor.is_contiguous():
        return True
    order = memory_order(tensor.shape, tensor.stride())
    if not order:
        return False
    return tensor.shape[0] == 1 or next(dim for dim in order if tensor.shape[dim] != 1) == 0
