"""A malicious checkpoint runs no code, reads nothing outside its folder, and is refused with an error that names it."""

from __future__ import annotations

import io
import os
import pickle
import re
import reprlib
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ema_dist.checkpoint.dcp import unpickler
from ema_dist.checkpoint.dcp.metadata import read_metadata
from ema_dist.checkpoint.dcp.reader import SafeReader, read_entries, safe_torch_load
from ema_dist.checkpoint.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FOLDER_READERS: dict[str, Callable[[Path], object]] = {
    "read_metadata": read_metadata,
    "read_entries": lambda folder: read_entries(folder, {"weight": torch.zeros(4, 3), "note": None}),
    "SafeReader": lambda folder: SafeReader(folder).read_metadata(),
}
"""Every function that opens a folder by DCP: each must refuse a malicious one."""

FILE_READERS: dict[str, Callable[[Path], object]] = {
    "safe_torch_load": lambda path: safe_torch_load(io.BytesIO(path.read_bytes())),
}
"""Every function that opens a file by `torch.save`."""

every_folder_reader = pytest.mark.parametrize("reader", FOLDER_READERS.values(), ids=FOLDER_READERS.keys())
every_file_reader = pytest.mark.parametrize("reader", FILE_READERS.values(), ids=FILE_READERS.keys())


class Payload:
    """Runs a shell command when it is unpickled: here, one that creates a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "harm-was-done"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("original") / "saved", note="as it was")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "saved")


def save(folder: Path, **extra: object) -> Path:
    dcp.save({"weight": torch.arange(12.0).view(4, 3), "inner": {"bias": torch.ones(3)}, **extra}, checkpoint_id=folder)
    return folder


def edit(folder: Path, change: Callable[[Metadata], object]) -> None:
    """Rewrite the metadata after ``change``."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata, protocol=4))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


SYSTEM = named(os.system.__module__, "system")

PICKLES: dict[str, Callable[[str], bytes]] = {
    "reduce": lambda command: b"\x80\x04" + SYSTEM + text(command) + b"\x85R.",
    "exec": lambda command: (
        b"\x80\x04" + named("builtins", "exec") + text(f"import os; os.system({command!r})") + b"\x85R."
    ),
    "global": lambda command: f"c{os.system.__module__}\nsystem\n(V{command}\ntR.".encode(),
    "inst": lambda command: f"(V{command}\ni{os.system.__module__}\nsystem\n.".encode(),
    "obj": lambda command: f"(c{os.system.__module__}\nsystem\nV{command}\no.".encode(),
    "newobj": lambda command: (
        b"\x80\x04"
        + named("builtins", "tuple")
        + named("builtins", "map")
        + SYSTEM
        + b"]"
        + text(command)
        + b"a\x86\x81\x85\x81."
    ),
    "build": lambda command: (
        b"\x80\x04"
        + named("torch.nn", "Identity")
        + b")\x81}"
        + text("__setstate__")
        + SYSTEM
        + b"sb"
        + text(command)
        + b"b."
    ),
    "by attribute": lambda command: (
        b"\x80\x04" + named("torch.distributed.checkpoint.filesystem", "os.system") + text(command) + b"\x85R."
    ),
}
"""Pickles that run a shell command, one for each way in which a pickle can call something."""


@pytest.mark.parametrize("pickled", PICKLES.values(), ids=PICKLES.keys())
def test_the_payloads_run_under_plain_pickle(pickled: Callable[[str], bytes], marker: Path) -> None:
    """Otherwise the tests below would prove nothing."""
    pickle.loads(pickled(f"touch {marker}"))
    assert marker.exists()


@every_folder_reader
@pytest.mark.parametrize("pickled", PICKLES.values(), ids=PICKLES.keys())
def test_crafted_metadata_runs_nothing(
    pickled: Callable[[str], bytes], reader: Callable[[Path], object], folder: Path, marker: Path
) -> None:
    (folder / ".metadata").write_bytes(pickled(f"touch {marker}"))
    with pytest.raises(CheckpointError, match=re.escape(str(folder / ".metadata")) + r"\b.*\bDCP\b"):
        reader(folder)
    assert not marker.exists()


PAYLOAD_POSITIONS: dict[str, Callable[[Metadata, Payload], object]] = {
    "all entries": lambda metadata, payload: setattr(metadata, "state_dict_metadata", payload),
    "an entry": lambda metadata, payload: metadata.state_dict_metadata.update(weight=payload),
    "a size": lambda metadata, payload: setattr(metadata.state_dict_metadata["weight"], "size", payload),
    "a chunk": lambda metadata, payload: metadata.state_dict_metadata["weight"].chunks.append(payload),
    "a path": lambda metadata, payload: metadata.planner_data.update(weight=payload),
    "a key": lambda metadata, payload: metadata.storage_data.update({payload: payload}),
    "an item": lambda metadata, payload: metadata.storage_data.update({MetadataIndex("note"): payload}),
    "storage_meta": lambda metadata, payload: setattr(metadata.storage_meta, "checkpoint_id", payload),
    "an unknown attribute": lambda metadata, payload: setattr(metadata, "later", payload),
}


@every_folder_reader
@pytest.mark.parametrize("insert", PAYLOAD_POSITIONS.values(), ids=PAYLOAD_POSITIONS.keys())
def test_payloads_inside_valid_metadata_run_nothing(
    insert: Callable[[Metadata, Payload], object], reader: Callable[[Path], object], folder: Path, marker: Path
) -> None:
    edit(folder, lambda metadata: insert(metadata, Payload(marker)))
    with pytest.raises(CheckpointError, match=r"\.metadata\b.*(posix|nt)\.system"):
        reader(folder)
    assert not marker.exists()
    dcp.FileSystemReader(folder).read_metadata()
    assert marker.exists()


@pytest.mark.parametrize("module_and_name", [*unpickler.RECORD_TYPES, ("torch", "Size"), ("torch", "float32")], ids=str)
@pytest.mark.parametrize("state", [b"N}" + text("poisoned") + b"\x88s\x86", b"}" + text("poisoned") + b"\x88s"])
def test_allowed_classes_cannot_be_modified_by_a_pickle(
    module_and_name: tuple[str, str], state: bytes, folder: Path
) -> None:
    """The opcode BUILD sets attributes on any object: a class would stay modified for the rest of the process."""
    (folder / ".metadata").write_bytes(b"\x80\x04" + named(*module_and_name) + state + b"b.")
    with pytest.raises(CheckpointError, match=r"\.metadata\b.*\bDCP\b"):
        read_metadata(folder)
    module, name = module_and_name
    assert not hasattr(getattr(sys.modules.get(module), name, None), "poisoned")
    assert not any(hasattr(record, "poisoned") for record in unpickler.RECORD_TYPES.values())


def test_plain_pickle_would_change_a_class() -> None:
    state = b"N}" + text("poisoned") + b"\x88s\x86"
    pickle.loads(b"\x80\x04" + named(ChunkStorageMetadata.__module__, ChunkStorageMetadata.__name__) + state + b"b.")
    assert ChunkStorageMetadata.poisoned
    del ChunkStorageMetadata.poisoned


@pytest.mark.parametrize("opcode", [b"r\xff\xff\xff\x7f", b"q\x01", b"p2147483647\n"])
def test_a_pickle_cannot_choose_how_much_memory_it_takes(opcode: bytes, folder: Path) -> None:
    """CPython makes a memo as long as the highest index: 2**31 pointers for this one."""
    (folder / ".metadata").write_bytes(b"\x80\x04]" + opcode + b".")
    with pytest.raises(CheckpointError, match=r"opcode b'[rqp]'.*\b3\b"):
        read_metadata(folder)


def test_a_crafted_byte_entry_runs_nothing(tmp_path: Path, marker: Path) -> None:
    """The metadata beside it is clean."""
    folder = save(tmp_path / "saved", note=Payload(marker))
    assert read_metadata(folder).state_dict_metadata.keys() == {"weight", "inner.bias", "note"}
    with pytest.raises(CheckpointError, match=r"'note'.*bytes \d+.*(posix|nt)\.system"):
        read_entries(folder, {"note": None})
    assert not marker.exists()
    dcp.load({"note": None}, checkpoint_id=folder)
    assert marker.exists()


def test_a_byte_entry_of_an_unknown_class_says_how_to_admit_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", note=Path("somewhere"))
    wanted = {"note": None}
    with pytest.raises(CheckpointError, match=r"add_safe_globals\(\[pathlib"):
        read_entries(folder, wanted)
    with torch.serialization.safe_globals([type(Path()), *([] if sys.version_info < (3, 13) else [Path])]):
        read_entries(folder, wanted)
    assert wanted == {"note": Path("somewhere")}


@every_file_reader
def test_a_crafted_file_runs_nothing(reader: Callable[[Path], object], tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.ones(2), "more": Payload(marker)}, path)
    with pytest.raises(CheckpointError, match=r"(posix|nt)\.system"):
        reader(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@every_file_reader
@pytest.mark.parametrize("pickled", PICKLES.values(), ids=PICKLES.keys())
def test_a_pickle_called_a_torch_file_runs_nothing(
    pickled: Callable[[str], bytes], reader: Callable[[Path], object], tmp_path: Path, marker: Path
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(pickled(f"touch {marker}"))
    with pytest.raises(CheckpointError, match=r"archive.*torch\.save"):
        reader(path)
    assert not marker.exists()


def test_crafted_bytes_of_a_tensor_run_nothing(folder: Path, marker: Path) -> None:
    torch.save(Payload(marker), file := io.BytesIO())
    replace_item(folder, "weight", file.getvalue())
    with pytest.raises(CheckpointError, match=r"'weight'.*bytes \d+.*(posix|nt)\.system"):
        read_entries(folder, {"weight": torch.zeros(4, 3)})
    assert not marker.exists()


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(4, 3).double(),
        torch.ones(3),
        torch.ones(1, 3),
        [1.0],
        torch.ones(4, 3).to_sparse(),
        torch.ones(4, 3, device="meta"),
    ],
)
def test_a_stored_tensor_must_match_the_metadata(value: object, folder: Path) -> None:
    """DCP would cast and broadcast."""
    torch.save(value, file := io.BytesIO())
    replace_item(folder, "weight", file.getvalue())
    with pytest.raises(CheckpointError, match=r"'weight'.*torch\.float32 \[4, 3\].*metadata"):
        read_entries(folder, {"weight": torch.zeros(4, 3)})


def replace_item(folder: Path, name: str, data: bytes) -> None:
    """Point the item of a tensor at other bytes, appended to its file."""

    def change(metadata: Metadata) -> None:
        (index,) = (index for index in metadata.storage_data if index.fqn == name)
        item = metadata.storage_data[index]
        path = folder / item.relative_path
        metadata.storage_data[index] = replace(item, offset=path.stat().st_size, length=len(data))
        path.write_bytes(path.read_bytes() + data)

    edit(folder, change)


_opened: list[str] = []


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note_opened)  # here, because a hook stays for the life of the process


@contextmanager
def files_opened() -> Iterator[list[str]]:
    """Collects the names of the files that Python opens in the block."""
    opened: list[str] = []
    _opened.clear()
    try:
        yield opened
    finally:
        opened += _opened


@pytest.mark.parametrize(
    "name", ["../outside", "sub/../../outside", "{outside}", "..", ".", "", "sub/", "C:outside", "..\\outside", "a\0b"]
)
def test_a_file_name_that_leads_elsewhere_is_refused(name: str, folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / "sub").mkdir()
    outside.write_bytes((folder / "__0_0.distcp").read_bytes())
    rename_data_file(folder, name.format(outside=outside))
    message = rf"\bname\b.*{re.escape(str(folder))}\b.*{re.escape(reprlib.repr(name.format(outside=outside)))}"
    with files_opened() as opened, pytest.raises(CheckpointError, match=message):
        read_entries(folder, {"weight": torch.zeros(4, 3), "note": None})
    assert opened == [str(folder / ".metadata")]


def test_torch_follows_a_file_name_that_leads_elsewhere(folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder.parent / "outside")
    rename_data_file(folder, "../outside")
    with files_opened() as opened:
        dcp.load({"weight": (weight := torch.zeros(4, 3))}, checkpoint_id=folder)
    assert weight.sum() == 66
    assert any("outside" in path for path in opened)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_link_out_of_the_folder_is_refused(name: str, folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    message = re.escape(str(folder / name)) + r"\b.*link"
    with files_opened() as opened, pytest.raises(CheckpointError, match=message):
        read_entries(folder, {"weight": torch.zeros(4, 3)})
    assert opened == ([] if name == ".metadata" else [str(folder / ".metadata")])


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder / "blob")
    (folder / "__0_0.distcp").symlink_to(folder / "blob")
    read_entries(folder, {"weight": (weight := torch.zeros(4, 3))})
    assert weight.sum() == 66


def rename_data_file(folder: Path, name: str) -> None:
    def change(metadata: Metadata) -> None:
        metadata.storage_data = {
            index: replace(item, relative_path=name) for index, item in metadata.storage_data.items()
        }

    edit(folder, change)


def weight_entry(metadata: Metadata) -> TensorStorageMetadata:
    return metadata.state_dict_metadata["weight"]


def rechunk(metadata: Metadata, *chunks: tuple[list[int], list[int]]) -> None:
    """Give the weight these chunks, each with an item."""
    item = metadata.storage_data.pop(MetadataIndex("weight", [0, 0]))
    weight_entry(metadata).chunks[:] = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in chunks]
    metadata.storage_data |= {MetadataIndex("weight", at): item for at, _ in chunks}


def change_item(metadata: Metadata, **changes: object) -> None:
    index = MetadataIndex("weight", [0, 0])
    metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)


CHUNKS = r"chunks.*\[4, 3\].*'weight'"

INVALID_METADATA: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "a gap": (lambda metadata: rechunk(metadata, ([0, 0], [3, 3])), CHUNKS),
    "an overlap": (lambda metadata: rechunk(metadata, ([0, 0], [3, 3]), ([2, 0], [2, 3])), CHUNKS),
    "gap and overlap": (
        lambda metadata: rechunk(metadata, ([0, 0], [2, 3]), ([1, 0], [2, 3])),
        CHUNKS,
    ),
    "no chunks": (lambda metadata: weight_entry(metadata).chunks.clear(), CHUNKS),
    "beyond the end": (
        lambda metadata: rechunk(metadata, ([0, 0], [2, 3]), ([3, 0], [2, 3])),
        r"chunk.*\[3, 0\].*\[2, 3\].*\[4, 3\]",
    ),
    "other dimensions": (lambda metadata: rechunk(metadata, ([0], [12])), r"chunk.*\[0\].*\[12\].*\[4, 3\]"),
    "a negative size": (lambda metadata: rechunk(metadata, ([0, 0], [-4, -3])), r"size \[-4, -3\]"),
    "a huge size": (
        lambda metadata: setattr(weight_entry(metadata), "size", torch.Size([2**40, 2**40])),
        r"size \[1099511627776, ",
    ),
    "too few bytes": (lambda metadata: change_item(metadata, length=40), r"\b40 bytes.*\b48 bytes"),
    "no item": (
        lambda metadata: metadata.storage_data.pop(MetadataIndex("weight", [0, 0])),
        r"no item.*\[0, 0\]",
    ),
    "no item of bytes": (
        lambda metadata: metadata.storage_data.pop(MetadataIndex("note")),
        r"no item.*'note'",
    ),
    "a negative offset": (lambda metadata: change_item(metadata, offset=-1), r"-1\b.*negative"),
    "a number in words": (lambda metadata: change_item(metadata, offset="0"), r"'0'.*\bint\b"),
    "after the end": (
        lambda metadata: change_item(metadata, offset=10**6),
        r"__0_0\.distcp\b.*truncated.*'weight'.*\b100\d{4}\b",
    ),
    "no such file": (lambda metadata: change_item(metadata, relative_path="__9_9.distcp"), r"__9_9\.distcp\b.*missing"),
    "a folder": (lambda metadata: change_item(metadata, relative_path="sub"), r"\bsub\b.*missing"),
    "another path": (
        lambda metadata: metadata.planner_data.update(weight=("inner", "weight")),
        r"\('inner', 'weight'\).*path",
    ),
    "a huge list": (
        lambda metadata: metadata.planner_data.update({"x.999999999": ("x", 999999999)}),
        "index 999999999",
    ),
    "no dtype": (lambda metadata: setattr(weight_entry(metadata), "properties", "float32"), "'float32'.*properties"),
    "no properties": (lambda metadata: setattr(weight_entry(metadata), "properties", None), "None.*properties"),
    "sparse": (
        lambda metadata: setattr(weight_entry(metadata), "properties", TensorProperties(layout=torch.sparse_coo)),
        "layout.*strided",
    ),
    "a name that is none": (
        lambda metadata: metadata.state_dict_metadata.update({1: weight_entry(metadata)}),
        r"\b1\b.*\bname\b",
    ),
}


@pytest.mark.parametrize(("change", "message"), INVALID_METADATA.values(), ids=INVALID_METADATA.keys())
def test_metadata_that_does_not_fit_together_is_refused(
    change: Callable[[Metadata], object], message: str, folder: Path
) -> None:
    (folder / "sub").mkdir()
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        read_metadata(folder)


def test_any_valid_chunking_is_accepted(folder: Path) -> None:
    edit(
        folder,
        lambda metadata: rechunk(
            metadata, ([0, 0], [1, 3]), ([1, 0], [3, 1]), ([1, 1], [2, 2]), ([3, 1], [1, 2]), ([4, 0], [0, 3])
        ),
    )
    assert len(weight_entry(read_metadata(folder)).chunks) == 5


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_malformed_file_found_by_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    folder = tmp_path / str(dist.get_rank())  # as if one machine saw a damaged copy
    state = {"weight": torch.ones(4, 3), "note": "as it was"}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    read_entries(folder, {"weight": (weight := torch.zeros(4, 3))}, group=dist.group.WORLD)
    assert weight.sum() == 12
    if dist.get_rank() == 1:
        path = folder / "__0_0.distcp"
        path.write_bytes(path.read_bytes().replace(b"PK\3\4", b"...."))
    with pytest.raises(CheckpointError, match=r"^(?!.*rank 0).*rank 1\b.*/1/__0_0\.distcp\b.*'weight'.*bytes \d+"):
        read_entries(folder, {"weight": torch.zeros(4, 3)}, group=dist.group.WORLD)
    missing = {} if dist.get_rank() == 0 else {"more": None}
    weight = torch.zeros(4, 3)
    with pytest.raises(CheckpointError, match=r"^(?!.*rank 0).*rank 1\b.*/1\b.*entries.*\bmore\b"):
        read_entries(folder, {"weight": weight, **missing}, group=dist.group.WORLD)
    assert weight.sum() == 0
