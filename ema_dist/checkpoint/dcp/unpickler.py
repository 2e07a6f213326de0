"""Unpickles DCP's metadata into inert records: no class that the checkpoint chooses is looked up or called.

There are two checks. Opcodes: only those in pickles of DCP's metadata are allowed, so that a pickle cannot call a
function by name, choose its memo indices (2**31 takes 32 GiB) or fetch objects from a registry. Globals: each of the
few that DCP writes is replaced by a class of this module, which only holds its arguments and which the pickle cannot
modify. The real classes are used only after `ema_dist.checkpoint.dcp.metadata` has checked every value.
Not covered: a pickle that nests tuples some 100 000 deep and uses them as a key crashes the process in CPython's hash.
"""

from __future__ import annotations

import io
import pickle
import re
from typing import Any

import torch


class _FrozenType(type):
    """The type of classes that a pickle cannot modify: the opcode BUILD would set attributes on them."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"it sets {name} on {cls.__name__}")


class Record(metaclass=_FrozenType):
    """Replaces an object of a class that DCP writes; holds its arguments, and its state as attributes."""

    args: tuple[object, ...] = ()

    def __init__(self, *args: object) -> None:
        self.args = args

    def __repr__(self) -> str:
        return f"a {type(self).__name__}"


class MetadataRecord(Record):
    """For DCP's Metadata."""


class TensorRecord(Record):
    """For DCP's TensorStorageMetadata."""


class BytesRecord(Record):
    """For DCP's BytesStorageMetadata."""


class ChunkRecord(Record):
    """For DCP's ChunkStorageMetadata."""


class IndexRecord(Record):
    """For DCP's MetadataIndex, a key of a dictionary: records are compared by identity."""


class ItemRecord(Record):
    """For DCP's record of the file and byte range of an item."""


class PropertiesRecord(Record):
    """For DCP's TensorProperties, whose state is a tuple."""

    state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class LayoutRecord(Record):
    """For a torch.layout."""


class MemoryFormatRecord(Record):
    """For a torch.memory_format."""


class UnusedRecord(Record):
    """For values that are not used here: where and when the checkpoint was written."""


_DCP = "torch.distributed.checkpoint.metadata"
_BEFORE_2_3 = "torch.distributed._shard.sharded_tensor.metadata"

RECORD_TYPES: dict[tuple[str, str], type[Record]] = {
    (_DCP, "Metadata"): MetadataRecord,
    (_DCP, "TensorStorageMetadata"): TensorRecord,
    (_DCP, "BytesStorageMetadata"): BytesRecord,
    (_DCP, "ChunkStorageMetadata"): ChunkRecord,
    (_DCP, "MetadataIndex"): IndexRecord,
    (_DCP, "TensorProperties"): PropertiesRecord,
    (_DCP, "_MEM_FORMAT_ENCODING"): MemoryFormatRecord,
    (_DCP, "StorageMeta"): UnusedRecord,
    (_BEFORE_2_3, "TensorProperties"): PropertiesRecord,
    (_BEFORE_2_3, "MEM_FORMAT_ENCODING"): MemoryFormatRecord,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): ItemRecord,
    ("torch.serialization", "_get_layout"): LayoutRecord,
    **{
        (module, name): UnusedRecord
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}
"""The globals in pickles of DCP's metadata, besides torch.Size and dtypes, which a pickle cannot modify."""

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        try:
            return RECORD_TYPES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which DCP's metadata never contains") from None


def unpickle(data: bytes) -> object:
    """Unpickle DCP's metadata, with records in place of its objects; their contents are not checked yet.

    Memory: proportional to the pickle's size.
    Raises: pickle.UnpicklingError for an opcode or a global that DCP does not write; and whatever a damaged pickle
        makes an unpickler raise.
    """
    _check_opcodes(data)
    return _Unpickler(io.BytesIO(data)).load()


_BARE_OPCODES = re.escape(b"()]}NRabestu\x81\x85\x86\x87\x88\x89\x93\x94")
_FIXED_OPCODES = re.compile(rb"(?:[%b]+|[Kh\x80].|M..|[Jj].{4}|\x95.{8}){0,1000}" % _BARE_OPCODES, re.DOTALL)
"""Opcodes of a fixed length: marks, containers, constants, REDUCE, NEWOBJ, BUILD, STACK_GLOBAL, MEMOIZE; BININT1,
BINGET, PROTO; BININT2; BININT, LONG_BINGET; FRAME. At most 1000 in one match, because `re` takes memory for each."""

_LENGTH_BYTES = {ord(b"\x8c"): 1, ord(b"X"): 4, ord(b"\x8a"): 1}
"""Opcodes followed by a length, stored in this many bytes, and by data of that length: strings and large integers."""


def _check_opcodes(data: bytes) -> None:
    position = 0
    while position < len(data):
        end = _FIXED_OPCODES.match(data, position).end()  # pyrefly: ignore[missing-attribute]  it also matches an empty string
        if end == position:
            opcode = data[position]
            if opcode == ord(b"."):
                break
            if opcode not in _LENGTH_BYTES:
                raise pickle.UnpicklingError(
                    f"it has opcode {bytes([opcode])!r} at byte {position}, which DCP never writes"
                )
            start = position + 1 + _LENGTH_BYTES[opcode]
            end = start + int.from_bytes(data[position + 1 : start], "little")
        position = end
    if position != len(data) - 1:
        raise pickle.UnpicklingError(f"it has {len(data)} bytes, but its last instruction ends at byte {position}")
