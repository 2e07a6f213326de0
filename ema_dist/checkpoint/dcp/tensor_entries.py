"""What the metadata says of one entry: its size, dtype and chunks, each checked, and the chunks against the size."""

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

Entry = TensorStorageMetadata | BytesStorageMetadata

MOST_DIMS_CUT = 8
"""Of one tensor; DCP's own layouts cut along a few."""

_MEMORY_FORMATS = {0: torch.contiguous_format, 1: torch.channels_last, 2: torch.preserve_format}


class UnexpectedError(ValueError):
    """Something in the metadata that DCP does not write; the message says it all."""


def entry(name: str, found: object) -> Entry:
    """What the record of the entry ``name`` stands for.

    Raises: UnexpectedError when it is not what DCP writes, or when its chunks do not cover it exactly once.
    """
    if type(found) is BytesRecord:
        return BytesStorageMetadata()
    fields = vars(exactly(TensorRecord, found, "entry", name))
    size = size_of(fields.get("size"), name)
    properties = _properties(exactly(PropertiesRecord, fields.get("properties"), "properties", name), name)
    if prod(size) * properties.dtype.itemsize >= 2**63:
        unexpected(f"size {list(size)}", name)
    chunks = [_chunk(chunk, size, name) for chunk in exactly(list, fields.get("chunks"), "chunks", name)]
    if not _tile(size, chunks, name):
        unexpected(f"chunks that do not cover the size {list(size)} exactly once", name)
    return TensorStorageMetadata(properties, size, chunks)


def _properties(record: PropertiesRecord, name: str) -> TensorProperties:
    state = exactly(tuple, record.state, "properties", name)
    if len(state) != 5:
        unexpected(f"{len(state)} properties instead of 5", name)
    dtype, layout, requires_grad, memory_format, pin_memory = state
    if (found := exactly(LayoutRecord, layout, "layout", name).args) != ("torch.strided",):
        unexpected(f"layout {reprlib.repr(found)}, where DCP stores strided tensors", name)
    code = exactly(tuple, exactly(MemoryFormatRecord, memory_format, "memory format", name).args, "memory format", name)
    if len(code) != 1 or natural(code[0], name) not in _MEMORY_FORMATS:
        unexpected(f"memory format {reprlib.repr(code)}", name)
    return TensorProperties(
        exactly(torch.dtype, dtype, "dtype", name),
        torch.strided,
        exactly(bool, requires_grad, "requires_grad", name),
        _MEMORY_FORMATS[code[0]],
        exactly(bool, pin_memory, "pin_memory", name),
    )


def _chunk(found: object, size: torch.Size, name: str) -> ChunkStorageMetadata:
    fields = vars(exactly(ChunkRecord, found, "chunk", name))
    offsets, sizes = size_of(fields.get("offsets"), name), size_of(fields.get("sizes"), name)
    ends = map(operator.add, offsets, sizes)
    if not len(offsets) == len(sizes) == len(size) or any(map(operator.gt, ends, size)):
        unexpected(f"a chunk at {list(offsets)} with size {list(sizes)} in a tensor with size {list(size)}", name)
    return ChunkStorageMetadata(offsets, sizes)


def _tile(size: torch.Size, chunks: list[ChunkStorageMetadata], name: str) -> bool:
    """Whether every element lies in exactly one chunk.

    A box is a sum of steps at its corners, of alternating sign, and steps at different points are independent: so boxes
    add up to the whole exactly when their corners do.
    """
    if prod(size) == 0 or len(chunks) < 2:
        return prod(size) == 0 or any(chunk.sizes == size for chunk in chunks)
    lengths = zip(*(chunk.sizes for chunk in chunks), strict=True)
    cut = [dim for dim, (found, whole) in enumerate(zip(lengths, size, strict=True)) if set(found) != {whole}]
    if len(cut) > MOST_DIMS_CUT:
        unexpected(f"a cut along {len(cut)} dimensions, more than {MOST_DIMS_CUT}", name)
    corners: Counter[tuple[int, ...]] = Counter()
    for far in product((0, 1), repeat=len(cut)):
        sign = -1 if sum(far) % 2 else 1
        ends = list(zip(cut, far, strict=True))
        corners.subtract({tuple([size[dim] * end for dim, end in ends]): sign})
        for chunk in chunks:
            corners[tuple([chunk.offsets[dim] + chunk.sizes[dim] * end for dim, end in ends])] += sign
    return not any(corners.values())


def size_of(found: object, name: str) -> torch.Size:
    """``found``, a size without negative parts."""
    size = exactly(torch.Size, found, "size", name)
    if size and min(size) < 0:
        unexpected(f"size {list(size)}", name)
    return size


def natural(found: object, name: str) -> int:
    """``found``, an integer that is not negative."""
    number = exactly(int, found, "number", name)
    if number < 0:
        unexpected(f"{number} where there is no negative number", name)
    return number


def exactly(kind: type[T], found: object, what: str, name: str = "") -> T:
    """``found``, which is of this very type.

    Raises: UnexpectedError when it is not, saying what of the entry ``name`` it is.
    """
    if type(found) is not kind:
        unexpected(f"{reprlib.repr(found)} as {what}, where DCP writes a {kind.__name__}", name)
    return found


def unexpected(what: str, name: str = "") -> NoReturn:
    """Raise UnexpectedError: ``what`` has been found in the entry ``name``."""
    raise UnexpectedError(f"found {what}" + (f" (entry {name!r})" if name else ""))
