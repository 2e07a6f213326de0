"""Finds tensors that share memory: tensors with identical extents count as one, partial overlaps are reported."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # no public name

from ema_dist.sharding.mesh_shard import dtensor_local

MAX_STEPS = 100_000
"""The maximum number of steps of one exact comparison. Extents that need more count as overlapping."""


class Extent(NamedTuple):
    """The memory of one tensor on one device, in bytes; every dimension is longer than 1."""

    start: int
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    itemsize: int

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.start + _span(self.strides, self.sizes) + self.itemsize


def memory_key(tensor: Tensor) -> Hashable:
    """A key that is equal for tensors that count as one: the same object, or identical extents of the same memory.

    Wrapper subclasses count as one only if they are the same object. So do tensors without elements, because their
    addresses are all 0; except for DTensors with elements on other ranks: these count as one if they have the same
    storage object, so that all ranks come to the same result.
    """
    local = dtensor_local(tensor) if isinstance(tensor, DTensor) else tensor
    if not _has_addressable_memory(local):
        return id(tensor)
    placement = (tensor.placements, tensor.shape) if isinstance(tensor, DTensor) else None
    if not local.numel():
        # The identity of a storage has no public name.
        return (local.untyped_storage()._cdata, placement) if tensor.numel() else id(tensor)
    strides = local.stride()
    if 1 in local.shape:  # the stride of a dimension of size 1 has no effect
        strides = tuple(step for step, size in zip(strides, local.shape, strict=True) if size > 1)
    return local.device, local.data_ptr(), local.dtype, local.shape, strides, placement


def is_wrapper_subclass(local: Tensor) -> bool:
    """Whether ``local``, which is no DTensor, holds other tensors instead of memory of its own (quantized, float8)."""
    return is_traceable_wrapper_subclass(local)


def expanded_dims(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions along which `Tensor.expand` repeats the elements of a plain tensor."""
    if isinstance(tensor, DTensor) or tensor.layout is not torch.strided or 0 not in tensor.stride():
        return ()
    if not tensor.numel():
        return ()
    return tuple(dim for dim, step in enumerate(tensor.stride()) if step == 0 and tensor.shape[dim] > 1)


def distinct_elements(tensor: Tensor, dims: Iterable[int]) -> Tensor:
    """The view of ``tensor`` with one element along each of the expanded ``dims``."""
    for dim in dims:
        tensor = tensor.narrow(dim, 0, 1)
    return tensor


def has_equal_bits(left: Tensor, right: Tensor) -> bool:
    """Whether both tensors, of one device, have the same shape, dtype and bits, so that NaN equals NaN."""
    return (left.shape, left.dtype) == (right.shape, right.dtype) and torch.equal(
        *(tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right))
    )


def find_shared_memory(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Describes memory shared by tensors that do not count as one by `memory_key`, and what to do about it.

    The text is empty if there is none.

    Extents on one device are sorted by address; only those whose address ranges intersect are compared exactly, so that
    interleaved views (``w[:, :3]`` and ``w[:, 3:]``) are distinguished from overlapping ones.
    """
    names: list[str] = []
    extents_by_device: dict[torch.device, list[tuple[Extent, int]]] = {}
    for index, (name, tensor) in enumerate(named_tensors):
        names.append(name)
        local = dtensor_local(tensor) if isinstance(tensor, DTensor) else tensor
        if not _has_addressable_memory(local):
            continue
        if (dims := expanded_dims(local)) and isinstance(tensor, DTensor):
            return _overlapping_elements(name, "the local tensor of this DTensor is expanded")
        local = distinct_elements(local, dims)
        if not local.numel():
            continue
        extent = _extent(local)
        if overlaps_itself(extent):
            return _overlapping_elements(name, f"it was made by as_strided or unfold, with strides {local.stride()}")
        extents_by_device.setdefault(local.device, []).append((extent, index))
    for extents in extents_by_device.values():
        for pair in _overlapping_pairs(extents):
            first, second = sorted(pair)
            return (
                f"{names[first]!r} and {names[second]!r} share a part of their memory, and would overwrite each other's"
                " averages: give each its own memory (module.x = nn.Parameter(x.detach().clone())), or register one "
                "tensor under both names"
            )
    return ""


def _overlapping_elements(name: str, reason: str) -> str:
    return (
        f"elements of {name!r} share memory with each other ({reason}), and would overwrite each other's averages: "
        "store it without overlaps (module.x = nn.Parameter(x.detach().clone()))"
    )


def overlaps(left: Extent, right: Extent) -> bool:
    """Whether any byte belongs to both; also True if more than `MAX_STEPS` are needed to decide."""
    # Tensors of one dtype are compared element by element: bytes would hide common divisors of their strides.
    unit = gcd(left.start - right.start, left.itemsize, right.itemsize, *left.strides, *right.strides)
    # left.start + sum(stride * index) + byte == right.start + sum(stride * index) + byte, with the indices of the right
    # side counted from their last element, so that all terms are on one side and positive.
    terms = [
        (step // unit, size - 1)
        for extent in (left, right)
        for step, size in zip(extent.strides, extent.sizes, strict=True)
    ]
    terms += [(1, extent.itemsize // unit - 1) for extent in (left, right)]
    return _has_solution(terms, (right.end - left.start) // unit - 1)


def overlaps_itself(extent: Extent) -> bool:
    """Whether two elements of the tensor share a byte; also True if more than `MAX_STEPS` are needed to decide."""
    dims = sorted(zip(extent.strides, extent.sizes, strict=True))
    inner_span = extent.itemsize
    for stride, size in dims:
        if stride < inner_span:
            break
        inner_span += stride * (size - 1)
    else:
        return False  # each stride steps over all inner dimensions
    # Two different indices with one address: a sum of strides times index differences that is 0. The leading difference
    # is at least 1, the others may be negative and are counted from their minimum.
    for index, (stride, size) in enumerate(dims):
        others = dims[index + 1 :]
        terms = [(stride, size - 2), *((step, 2 * (length - 1)) for step, length in others)]
        if _has_solution(terms, sum(step * (length - 1) for step, length in others) - stride):
            return True
    return False


def _has_addressable_memory(tensor: Tensor) -> bool:
    """Whether ``tensor`` is strided and has storage; False for sparse and meta tensors, and for wrapper subclasses."""
    if is_wrapper_subclass(tensor):  # many report the address 0, and would be taken for one tensor
        return False
    try:
        return tensor.layout is torch.strided and not tensor.is_meta and tensor.data_ptr() >= 0
    except (RuntimeError, ValueError):  # from uninitialized parameters, and subclasses that cannot be flattened
        return False


def _extent(tensor: Tensor) -> Extent:
    itemsize = tensor.element_size()
    dims = [(step * itemsize, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return Extent(tensor.data_ptr(), tuple(step for step, _ in dims), tuple(size for _, size in dims), itemsize)


def _span(strides: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(stride * (size - 1) for stride, size in zip(strides, sizes, strict=True))


def _overlapping_pairs(extents: list[tuple[Extent, int]]) -> Iterator[tuple[int, int]]:
    open_extents: list[tuple[Extent, int]] = []
    for extent, index in sorted(extents):
        open_extents = [(other, other_index) for other, other_index in open_extents if other.end > extent.start]
        for other, other_index in open_extents:
            if overlaps(other, extent):
                yield other_index, index
        open_extents.append((extent, index))


def _has_solution(terms: Iterable[tuple[int, int]], total: int) -> bool:
    """Whether ``sum(step * count) == total`` has a solution with each count from 0 to its limit."""
    limits: dict[int, int] = {}
    for step, limit in terms:
        if limit:
            limits[step] = limits.get(step, 0) + limit
    ordered = sorted(limits.items(), reverse=True)
    # From each position on: the largest sum of the steps, and the divisor of all their sums.
    bounds = [(0, 0)]
    for step, limit in reversed(ordered):
        most, divisor = bounds[-1]
        bounds.append((most + step * limit, gcd(divisor, step)))
    bounds.reverse()
    stack = [iter((total,))]  # for each step whose count is chosen, what remains of the total after each possible count
    for _ in range(MAX_STEPS):
        index = len(stack) - 1
        remaining = next(stack[-1], None)
        if remaining is None:
            stack.pop()
            if not stack:
                return False
            continue
        most, divisor = bounds[index]
        if not 0 <= remaining <= most or (divisor and remaining % divisor):
            continue
        if index == len(ordered):
            return True
        step, limit = ordered[index]
        fewest = max(0, -((bounds[index + 1][0] - remaining) // step))
        largest = min(limit, remaining // step)
        stack.append(iter(range(remaining - fewest * step, remaining - largest * step - 1, -step)))
    return True
