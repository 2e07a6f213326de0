"""Checks the metadata of one entry: its size, its dtype, and that its chunks cover its size exactly once."""

from __future__ import annotations

import operator
import reprlib
from collections import Counter
from itertools import product
from math import prod
from typing import NoReturn, TypeVar

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from ema_dist.checkpoint.dcp.unpickler import (
    BytesRecord,
    ChunkRecord,
    LayoutRecord,
    MemoryFormatRecord,
    PropertiesRecord,
    TensorRecord,
)

T = TypeVar("T")

EntryMetadata = TensorStorageMetadata | BytesStorageMetadata

MAX_SHARDED_DIMS = 8
"""The most sharded dimensions of a tensor. DCP's layouts shard few; the check below visits 2**dims corners."""

_MEMORY_FORMATS = {0: torch.contiguous_format, 1: torch.channels_last, 2: torch.preserve_format}


class UnexpectedError(ValueError):
    """The metadata holds a value that DCP does not write; the message names the value and its entry."""


def parse_entry(name: str, record: object) -> EntryMetadata:
    """Turn the record of the entry ``name`` into DCP's metadata object.

    Raises: UnexpectedError when DCP writes no such record, or when the chunks do not cover the size exactly once.
    """
    if type(record) is BytesRecord:
        return BytesStorageMetadata()
    fields = vars(require_type(TensorRecord, record, "entry", name))
    size = require_size(fields.get("size"), name)
    properties = _parse_properties(require_type(PropertiesRecord, fields.get("properties"), "properties", name), name)
    if prod(size) * properties.dtype.itemsize >= 2**63:
        raise_unexpected(f"size {list(size)}", name)
    chunks = [_parse_chunk(chunk, size, name) for chunk in require_type(list, fields.get("chunks"), "chunks", name)]
    if not _is_tiling(size, chunks, name):
        raise_unexpected(f"chunks that do not cover the size {list(size)} exactly once", name)
    return TensorStorageMetadata(properties, size, chunks)


def _parse_properties(record: PropertiesRecord, name: str) -> TensorProperties:
    state = require_type(tuple, record.state, "properties", name)
    if len(state) != 5:
        raise_unexpected(f"{len(state)} properties instead of 5", name)
    dtype, layout, requires_grad, memory_format, pin_memory = state
    if (layout_args := require_type(LayoutRecord, layout, "layout", name).args) != ("torch.strided",):
        raise_unexpected(f"layout {reprlib.repr(layout_args)}, where DCP stores strided tensors", name)
    encoding = require_type(
        tuple, require_type(MemoryFormatRecord, memory_format, "memory format", name).args, "memory format", name
    )
    if len(encoding) != 1 or require_count(encoding[0], name) not in _MEMORY_FORMATS:
        raise_unexpected(f"memory format {reprlib.repr(encoding)}", name)
    return TensorProperties(
        require_type(torch.dtype, dtype, "dtype", name),
        torch.strided,
        require_type(bool, requires_grad, "requires_grad", name),
        _MEMORY_FORMATS[encoding[0]],
        require_type(bool, pin_memory, "pin_memory", name),
    )


def _parse_chunk(record: object, size: torch.Size, name: str) -> ChunkStorageMetadata:
    fields = vars(require_type(ChunkRecord, record, "chunk", name))
    offsets, sizes = require_size(fields.get("offsets"), name), require_size(fields.get("sizes"), name)
    ends = map(operator.add, offsets, sizes)
    if not len(offsets) == len(sizes) == len(size) or any(map(operator.gt, ends, size)):
        raise_unexpected(f"a chunk at {list(offsets)} with size {list(sizes)} in a tensor with size {list(size)}", name)
    return ChunkStorageMetadata(offsets, sizes)


def _is_tiling(size: torch.Size, chunks: list[ChunkStorageMetadata], name: str) -> bool:
    """Whether every element lies in exactly one chunk.

    The indicator function of a box is a sum of step functions at its corners, with alternating signs. Step functions at
    different points are linearly independent, so the chunks add up to the full box exactly when their corners do.
    """
    if prod(size) == 0 or len(chunks) < 2:
        return prod(size) == 0 or any(chunk.sizes == size for chunk in chunks)
    lengths = zip(*(chunk.sizes for chunk in chunks), strict=True)
    sharded_dims = [
        dim
        for dim, (chunk_lengths, full_length) in enumerate(zip(lengths, size, strict=True))
        if set(chunk_lengths) != {full_length}
    ]
    if len(sharded_dims) > MAX_SHARDED_DIMS:
        raise_unexpected(f"a tensor sharded along {len(sharded_dims)} dimensions, more than {MAX_SHARDED_DIMS}", name)
    corners: Counter[tuple[int, ...]] = Counter()
    for corner in product((0, 1), repeat=len(sharded_dims)):
        sign = -1 if sum(corner) % 2 else 1
        ends = list(zip(sharded_dims, corner, strict=True))
        corners.subtract({tuple([size[dim] * end for dim, end in ends]): sign})
        for chunk in chunks:
            corners[tuple([chunk.offsets[dim] + chunk.sizes[dim] * end for dim, end in ends])] += sign
    return not any(corners.values())


def require_size(value: object, name: str) -> torch.Size:
    """Return ``value`` if it is a size without negative numbers."""
    size = require_type(torch.Size, value, "size", name)
    if size and min(size) < 0:
        raise_unexpected(f"size {list(size)}", name)
    return size


def require_count(value: object, name: str) -> int:
    """Return ``value`` if it is an integer that is not negative."""
    number = require_type(int, value, "number", name)
    if number < 0:
        raise_unexpected(f"{number}, where DCP writes no negative number", name)
    return number


def require_type(expected_type: type[T], value: object, label: str, name: str = "") -> T:
    """Return ``value`` if its type is exactly ``expected_type``; a bool is not an int here.

    Raises: UnexpectedError otherwise, describing the value as ``label`` of the entry ``name``.
    """
    if type(value) is not expected_type:
        raise_unexpected(f"{reprlib.repr(value)} as {label}, where DCP writes a {expected_type.__name__}", name)
    return value


def raise_unexpected(description: str, name: str = "") -> NoReturn:
    """Raise UnexpectedError for a finding in the entry ``name``."""
    raise UnexpectedError(f"found {description}" + (f" (entry {name!r})" if name else ""))
