"""The bytes of a tensor in a file by `torch.save` are read directly, or else by torch.load, and never wrongly."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ema_dist.checkpoint.dcp import reader
from ema_dist.checkpoint.dcp.archive import FileSlice, byte_view, data_offset
from ema_dist.checkpoint.errors import CheckpointError

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int8, torch.uint8, torch.uint16, torch.bool),
]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

RECORDS = ["data.pkl", "byteorder", "data/0"]


def archive_of(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def repacked(archive: bytes, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The same archive with other contents of some records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, records.get(name.removeprefix("archive/"), old.read(name)))
    return buffer.getvalue()


def with_wrong_offset(archive: bytes) -> bytes:
    """The same archive, with a wrong offset of the elements in its directory."""
    at = archive.index(b"archive/data/0", archive.index(b"PK\x01\x02")) - 4
    return archive[:at] + (len(archive) - 20).to_bytes(4, "little") + archive[at + 4 :]


def read_full(entry: Tensor, folder: Path) -> Tensor:
    wanted = {"x": torch.empty_like(entry)}
    reader.read_entries(folder, wanted)
    return wanted["x"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1, 4), (300, 70_000)], ids=str)
def test_where_the_elements_of_a_saved_tensor_begin(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if dtype.itemsize > 2 and len(shape) == 2:
        shape = (300, 700)
    tensor = torch.randint(0, 2, shape).to(dtype)
    stream = io.BytesIO(archive_of(tensor))
    start = data_offset(stream, dtype, tensor.shape)
    assert start is not None
    actual = torch.empty_like(tensor)
    stream.seek(start)
    stream.readinto(byte_view(actual))
    assert bytes(byte_view(actual)) == bytes(byte_view(tensor))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.rand(4, 4).t(),
        lambda: torch.rand(8, 4)[4:],
        lambda: torch.rand(4, 8)[:, ::2],
        lambda: torch.rand(4, 4, requires_grad=True),
        lambda: torch.nn.Parameter(torch.rand(4, 4)),
        lambda: torch.rand(4, 4, dtype=torch.float64),
        lambda: torch.ones(4, 4, dtype=torch.int32),
        lambda: torch.rand(4, 2, dtype=torch.complex64),
        lambda: torch.rand(16),
        lambda: torch.rand(2, 8),
        lambda: [torch.rand(4, 4)],
    ],
    ids=[
        "transposed",
        "offset",
        "strided",
        "grad",
        "parameter",
        "float64",
        "int32",
        "complex",
        "flat",
        "other",
        "list",
    ],
)
def test_other_contents_fall_back_to_torch_load(make: Callable[[], Tensor]) -> None:
    assert data_offset(io.BytesIO(archive_of(make())), torch.float32, torch.Size((4, 4))) is None


def test_other_archives_fall_back_to_torch_load() -> None:
    tensor = torch.rand(4, 4)
    plain = archive_of(tensor)
    other_order = {"little": b"big", "big": b"little"}[sys.byteorder]
    other_archives = {
        "another byte order": repacked(plain, {"byteorder": other_order}),
        "compressed": repacked(plain, {}, zipfile.ZIP_DEFLATED),
        "a longer pickle": repacked(plain, {"data.pkl": b"\x80\x02" + b"0" * 1000 + b"."}),
        "fewer elements": repacked(plain, {"data/0": b"0" * 60}),
        "more elements": repacked(plain, {"data/0": b"0" * 68}),
        **{
            f"no {record}": plain.replace(f"archive/{record}".encode(), b"archive/" + b"?" * len(record))
            for record in RECORDS
        },
        "a record elsewhere than the directory says": with_wrong_offset(plain),
        "much beside the elements": plain[: plain.index(b"PK\x01\x02")]
        + b"0" * 2**17
        + plain[plain.index(b"PK\x01\x02") :],
        "no end": plain[:-30],
        "no archive": b"PK\x03\x04" + b"0" * 1000,
        "empty": b"",
    }
    assert data_offset(io.BytesIO(repacked(plain, {})), torch.float32, tensor.shape) is not None
    for label, content in other_archives.items():
        assert data_offset(io.BytesIO(content), torch.float32, tensor.shape) is None, label


@pytest.mark.parametrize("size", [10, reader.MAX_BUFFERED_BYTES // 16])
def test_tensors_as_dcp_writes_them_are_read_without_unpickling(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {str(dtype): torch.randint(0, 2, (size, 5)).to(dtype) for dtype in DTYPES}
    dcp.save(tensors, checkpoint_id=tmp_path)

    def refuse(_: object) -> None:
        raise AssertionError("torch.load is slow")

    monkeypatch.setattr(reader, "safe_torch_load", refuse)
    wanted = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    reader.read_entries(tmp_path, wanted)
    for name, tensor in tensors.items():
        assert bytes(byte_view(wanted[name])) == bytes(byte_view(tensor)), name


def test_targets_of_another_dtype_or_stride_are_filled_too(tmp_path: Path) -> None:
    tensor = torch.rand(6, 4)
    dcp.save({"x": tensor}, checkpoint_id=tmp_path)
    assert torch.equal(read_full(torch.empty(6, 4, dtype=torch.float64), tmp_path), tensor.double())
    transposed: dict[str, Tensor] = {"x": torch.empty(4, 6).t()}
    reader.read_entries(tmp_path, transposed)
    assert torch.equal(transposed["x"], tensor)
    assert transposed["x"].stride() == (1, 6)


def test_reading_into_a_tensor_bumps_its_version(tmp_path: Path) -> None:
    weight = torch.rand(4, requires_grad=True)
    dcp.save({"x": weight.detach()}, checkpoint_id=tmp_path)
    loss = (weight * weight).sum()
    reader.read_entries(tmp_path, {"x": weight})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_archive_whose_elements_are_elsewhere_is_named(tmp_path: Path) -> None:
    tensor = torch.rand(4, 4)
    dcp.save({"x": tensor}, checkpoint_id=tmp_path)
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(with_wrong_offset(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp.*'x'.*bytes 0\D+\d+"):
        read_full(tensor, tmp_path)


class Wrapped(Tensor):
    """Keeps its elements in another tensor, as quantised parameters do."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type[Wrapped], inner: Tensor) -> Wrapped:  # noqa: PYI034
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # noqa: SLF001  torch has no other
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        plain = torch.utils._pytree.tree_map_only(Wrapped, lambda wrapper: wrapper.inner, args)  # noqa: SLF001
        out = func(*plain, **(kwargs or {}))
        return args[0] if func is torch.ops.aten.copy_.default else Wrapped(out)


@pytest.mark.parametrize(
    ("make", "elements"),
    [
        (lambda: Wrapped(torch.zeros(6, 4)), lambda target: target.inner),
        (lambda: torch.zeros(6, 4, dtype=torch.complex64).conj(), lambda target: target.resolve_conj()),
        (lambda: torch.zeros(6, 4, dtype=torch.complex64).conj().imag, lambda target: target.resolve_neg()),
    ],
    ids=["wrapped", "conjugated", "negated"],
)
def test_elements_are_not_written_where_a_target_does_not_have_them(
    make: Callable[[], Tensor], elements: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    target = make()
    tensor = torch.rand(6, 4).to(elements(target).dtype)
    dcp.save({"x": tensor}, checkpoint_id=tmp_path)
    reader.read_entries(tmp_path, {"x": target})
    assert torch.equal(elements(target), tensor)


@pytest.mark.parametrize("is_cached", [False, True], ids=["first", "again"])
def test_reading_ignores_the_default_device(is_cached: bool, tmp_path: Path) -> None:  # noqa: FBT001
    tensor = torch.rand(6, 4, dtype=torch.float64 if is_cached else torch.float32)
    dcp.save({"x": tensor, "y": tensor}, checkpoint_id=tmp_path)
    if is_cached:
        read_full(tensor, tmp_path)
    wanted = {"x": torch.empty(4, 6).t(), "y": None}
    with torch.device("meta"):
        reader.read_entries(tmp_path, wanted)
    assert torch.equal(wanted["x"], tensor.float())
    assert torch.equal(wanted["y"], tensor)


def test_a_file_slice_reads_its_range_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with path.open("rb") as file:
        file_slice = FileSlice(file, 10, 20)
        assert file_slice.read() == bytes(range(10, 30))
        assert file_slice.seek(-5, io.SEEK_END) == 15
        assert file_slice.read(2) == bytes((25, 26))
        assert file_slice.seek(1, io.SEEK_CUR) == file_slice.tell() == 18
        assert file_slice.read(50) == bytes((28, 29))
        with pytest.raises(ValueError, match=r"position.*-1\b"):
            file_slice.seek(-21, io.SEEK_END)
        file_slice.seek(40)
        assert file_slice.read(1) == b""
