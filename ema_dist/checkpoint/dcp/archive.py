"""Finds the bytes of the tensor in an archive by `torch.save`, so that they can be read without unpickling."""

from __future__ import annotations

import ctypes
import io
import os
import pickle
import sys
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

import torch
from torch import Tensor

HEADER_BYTES = 30
"""The size of a local header in a zip archive. Its last four bytes are the lengths of the name and of the padding."""

DATA_RECORD = b"archive/data/0"

MAX_OVERHEAD_BYTES = 2**16
"""An archive of one tensor has fewer bytes besides the elements; searching a larger archive would take long."""


class FileSlice(io.RawIOBase):
    """A range of bytes of an open file, as a file of its own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._descriptor = file.fileno()
        self._offset = offset
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence] + offset
        if position < 0:
            raise ValueError(f"expected a position of 0 or more, got {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        remaining = memoryview(buffer)[: max(0, self._length - self._position)]
        start = self._position
        while count := os.preadv(self._descriptor, [remaining], self._offset + self._position) if remaining else 0:
            self._position += count
            remaining = remaining[count:]
        return self._position - start


def data_offset(stream: IO[bytes], dtype: torch.dtype, shape: torch.Size) -> int | None:
    """The offset of the elements, in order, of a CPU tensor that `torch.save` wrote; changes the stream's position.

    None unless the archive is exactly what `torch.save` writes for a contiguous tensor of this dtype and shape that
    does not share its storage: any other archive must be read by `torch.load`.
    """
    try:
        expected, size = _expected_pickle(dtype, shape), shape.numel() * dtype.itemsize
        if stream.seek(0, os.SEEK_END) > size + MAX_OVERHEAD_BYTES:
            return None
        with zipfile.ZipFile(stream) as archive:
            head, order, data = (archive.getinfo(f"archive/{name}") for name in ("data.pkl", "byteorder", "data/0"))
            if (
                any(record.compress_type != zipfile.ZIP_STORED for record in (head, order, data))
                or (head.file_size, data.file_size) != (len(expected), size)
                or archive.read(head) != expected
                or archive.read(order) != sys.byteorder.encode()
            ):
                return None
        stream.seek(data.header_offset)
        header = stream.read(HEADER_BYTES + len(DATA_RECORD))
        name_bytes, padding = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        if not header.startswith(b"PK\x03\x04") or name_bytes != len(DATA_RECORD) or not header.endswith(DATA_RECORD):
            return None
    except Exception:  # noqa: BLE001  torch.load will report what is wrong
        return None
    return data.header_offset + HEADER_BYTES + name_bytes + padding


def is_contiguous_cpu(tensor: Tensor) -> bool:
    """Whether the elements are contiguous in CPU memory, with no conjugation or negation pending."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
    )


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a tensor that `is_contiguous_cpu`; the tensor must outlive the view."""
    # Not through numpy, which may not be installed and lacks some dtypes.
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


@lru_cache(maxsize=1024)
def _expected_pickle(dtype: torch.dtype, shape: torch.Size) -> bytes:
    """The pickle that `torch.save` writes for a contiguous CPU tensor; the elements are in a separate record."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(_TensorStandIn(dtype, shape))
    return buffer.getvalue()


class _TensorStandIn:
    """Pickles like a tensor of this dtype and shape, without allocating one."""

    def __init__(self, dtype: torch.dtype, shape: torch.Size) -> None:
        self._dtype = dtype
        self._shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        empty = torch.empty(0, dtype=self._dtype, device="cpu")
        rebuild, (storage, offset, _, _, *rest) = empty.__reduce_ex__(2)
        if isinstance(storage, torch.UntypedStorage):  # newer dtypes have no typed storage
            stand_in = _StorageStandIn(torch.UntypedStorage, self._shape.numel() * self._dtype.itemsize)
        else:
            stand_in = _StorageStandIn(
                getattr(torch, empty.type().split(".")[1].replace("Tensor", "Storage")), self._shape.numel()
            )
        stride = torch.empty(self._shape, device="meta").stride()
        return rebuild, (stand_in, offset, tuple(self._shape), stride, *rest)


@dataclass(frozen=True)
class _StorageStandIn:
    """Pickles like a storage of this class, with this size in elements."""

    storage_type: type
    size: int


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple[object, ...] | None:
        return ("storage", obj.storage_type, "0", "cpu", obj.size) if isinstance(obj, _StorageStandIn) else None
