"""Weight files: what other libraries load, streaming, atomic replacement, and crafted files that must not run code."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ema_dist import ShardedEMA
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.gathering import gather, scatter
from ema_dist.checkpoint.loading import latest
from ema_dist.checkpoint.saving import save
from ema_dist.checkpoint.weights.formats import FileFormat
from ema_dist.checkpoint.weights.reader import WeightReader
from ema_dist.checkpoint.weights.weight_writer import WeightWriter
from tests.support import harness
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    IGNORED_WARNINGS,
    assert_bitwise_equal,
    layouts,
    make_net,
    make_trained,
    peak_resident_memory,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


# Before 1.0, huggingface_hub misses in each of several files what the others hold.
READS_SHARDS_STRICTLY = int(huggingface_hub.__version__.split(".")[0]) >= 1

FORMATS = pytest.mark.parametrize("file_format", ["safetensors", "torch"])


def write(folder: Path, tensors: dict[str, Any], **settings: Any) -> list[Path]:  # noqa: ANN401
    """Write tensors with a WeightWriter and return its files."""
    planned = {name: value.to("meta") if isinstance(value, Tensor) else None for name, value in tensors.items()}
    with WeightWriter(folder, planned=planned, **settings) as writer:
        for name, value in tensors.items():
            writer.add(name, value)
    return writer.paths


def bits(value: Tensor) -> list[int]:
    return value.contiguous().flatten().view(torch.uint8).tolist()


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        assert bits(actual[name]) == bits(value), name


def load_like_transformers(folder: Path) -> dict[str, Tensor] | None:
    """Load like transformers: a single file if there is one, else the files of an index; None if there is neither."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    if not (folder / "model.safetensors.index.json").exists():
        return None
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    return {name: shards[file][name] for name, file in index["weight_map"].items()}


UNUSUAL_TENSORS = {
    "bfloat16": torch.randn(3, 5).bfloat16(),
    "float8": torch.randn(4).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False, True]),
    "int64": torch.tensor(2**40),
    "zero_dim": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "transposed": torch.randn(4, 6).t(),
    "slice_of_a_larger_one": torch.randn(100)[3:7],
    "complex64": torch.randn(3, dtype=torch.complex64).conj(),
    "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
}


@FORMATS
@pytest.mark.parametrize("max_shard_size", [1, 64, "5GB"])
def test_unusual_tensors_round_trip_exactly(tmp_path: Path, file_format: FileFormat, max_shard_size: int | str) -> None:
    """In one file or in one file each; both names of a shared tensor are written."""
    tensors = UNUSUAL_TENSORS | {"tied": UNUSUAL_TENSORS["nan"], "view": UNUSUAL_TENSORS["transposed"].t()}
    paths = write(tmp_path, tensors, max_shard_size=max_shard_size, file_format=file_format)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert (len(paths) > 1) == (max_shard_size != "5GB")
    files = WeightReader(tmp_path)
    resolved = {name: value.resolve_conj() for name, value in tensors.items()}
    assert_same(dict(files), resolved)
    assert {name: (meta.dtype, meta.shape) for name, meta in files.meta_tensors.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()
    }
    if file_format == "safetensors":
        actual = load_like_transformers(tmp_path)
        assert actual is not None
        assert_same(actual, resolved)
    else:
        assert max(path.stat().st_size for path in paths) < 20_000


@pytest.mark.parametrize("max_shard_size", [1, 64, "5GB"])
def test_every_tensor_lies_aligned_in_its_file(tmp_path: Path, max_shard_size: int | str) -> None:
    """Readers that map files into memory need a float32 at a multiple of 4 bytes."""
    tensors = {
        "odd": torch.zeros(3, dtype=torch.uint8),
        **UNUSUAL_TENSORS,
        "double": torch.zeros(2, dtype=torch.float64),
    }
    write(tmp_path, tensors, max_shard_size=max_shard_size)
    for path in tmp_path.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                assert (8 + length + entry["data_offsets"][0]) % tensors[name].itemsize == 0, name


@layouts("plain", "ddp", "fsdp1", "fsdp2", "hsdp", "tp")
def test_files_hold_the_full_state_dict(layout: str, tmp_path: Path) -> None:
    """The files load strictly, with the index that transformers expects, through other libraries' readers."""
    _, ema = make_trained(layout)
    full = ema.full_state_dict()
    paths = gather(ema, tmp_path / "many", max_shard_size=400)
    single = gather(ema, tmp_path / "one")
    if not full:
        assert paths == single == []
        return
    assert single == [tmp_path / "one" / "model.safetensors"]
    count = len(paths) - 1
    assert [path.name for path in paths] == [
        *(f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)),
        "model.safetensors.index.json",
    ]
    index = json.loads(paths[-1].read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in full.values())
    assert list(index["weight_map"]) == list(full)
    for folder in (tmp_path / "many", tmp_path / "one"):
        actual = load_like_transformers(folder)
        assert actual is not None
        assert_same(actual, full)
        net = make_net(layout, seed=3)
        huggingface_hub.load_torch_model(net, folder, strict=folder.name == "one" or READS_SHARDS_STRICTLY)
        assert_same(net.state_dict(), full)


@pytest.mark.world_size(2)
def test_dtype_and_torch_format_of_a_gathered_model(tmp_path: Path) -> None:
    _, ema = make_trained("fsdp2")
    gather(ema, tmp_path, dtype=torch.bfloat16, file_format="torch", max_shard_size="0.3KB")
    full = ema.full_state_dict(dtype=torch.bfloat16)
    if full:
        assert_same(dict(WeightReader(tmp_path)), full)
        index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
        shard = tmp_path / index["weight_map"]["head.weight"]
        assert torch.equal(torch.load(shard, weights_only=True)["head.weight"], full["head.weight"])


def gather_from(layout: str, folder: Path) -> None:
    _, ema = make_trained(layout)
    gather(ema, folder, max_shard_size=500)


def scatter_into(layout: str, folder: Path) -> None:
    model, ema = make_trained(layout, net=make_net("tp" if "tp" in folder.name else layout, seed=1))
    live = {name: value.clone() for name, value in model.state_dict().items()}
    scatter(ema, folder)
    full = ema.full_state_dict()
    if full:
        frozen = {name for name in full if "frozen" in name}
        assert_bitwise_equal(
            {name: value for name, value in full.items() if name not in frozen},
            {name: value for name, value in WeightReader(folder).items() if name not in frozen},
        )
    for name, value in model.state_dict().items():
        assert torch.equal(getattr(value, "_local_tensor", value), getattr(live[name], "_local_tensor", live[name]))


@pytest.mark.parametrize(
    ("source", "target", "size"),
    [("fsdp2", "ddp", 2), ("fsdp2", "fsdp2-3", 3), ("ddp", "fsdp1", 2), ("tp", "hsdp", 4), ("fsdp1", "plain", 1)],
)
def test_averages_scatter_into_another_layout_and_world(tmp_path: Path, source: str, target: str, size: int) -> None:
    """Averages are bit-identical; live weights do not change."""
    filters = ("error", *(text for mark in IGNORED_WARNINGS for text in mark.args))
    for function, layout, ranks in ((gather_from, source, 2), (scatter_into, target, size)):
        arguments = pickle.dumps({"layout": layout, "folder": tmp_path / source})
        harness.run(harness.RemoteTest(__name__, function.__name__, arguments, filters), harness.World(ranks))


@pytest.mark.world_size(2)
def test_each_track_is_written_and_read_by_its_name(tmp_path: Path) -> None:
    _, ema = make_trained("fsdp2", decay={"short": 0.6, "long": 0.9})
    full = {track: ema.full_state_dict(track=track) for track in ("short", "long")}
    for track, expected in full.items():
        if gather(ema, tmp_path / track, track=track):
            assert_same(dict(WeightReader(tmp_path / track)), expected)
    scatter(ema, tmp_path / "short", track="long")
    assert_same(ema.full_state_dict(track="long"), full["short"])
    for call in (gather, scatter):
        with pytest.raises(ValueError, match=r"\['short', 'long'\].*'middle'"):
            call(ema, tmp_path / "short", track="middle")


OLD_TENSORS = {name: torch.full((4,), 1.0) for name in ("a", "b", "c")}
NEW_TENSORS = {name: torch.full((4,), 2.0) for name in ("a", "b", "c", "d")}


class Killed(BaseException):
    """Stands for the end of the process."""


def test_an_interrupted_stream_leaves_the_earlier_export_or_nothing(tmp_path: Path) -> None:
    def interrupted_stream() -> Iterator[tuple[str, Tensor]]:
        yield from list(NEW_TENSORS.items())[:3]
        raise OSError("no more")

    def write_interrupted() -> None:
        planned = {name: value.to("meta") for name, value in NEW_TENSORS.items()}
        with pytest.raises(OSError, match="no more"), WeightWriter(tmp_path, planned=planned, max_shard_size=16) as out:
            for name, value in interrupted_stream():
                out.add(name, value)

    write_interrupted()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"no weights.*\bmodel\.safetensors"):
        len(WeightReader(tmp_path))
    write(tmp_path, OLD_TENSORS, max_shard_size=16)
    before = sorted(tmp_path.iterdir())
    write_interrupted()
    assert sorted(tmp_path.iterdir()) == before
    assert_same(dict(WeightReader(tmp_path)), OLD_TENSORS)


@pytest.mark.parametrize("old_size", [16, "5GB"])
@pytest.mark.parametrize("new_size", [16, "5GB"])
def test_killed_at_any_step_leaves_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_size: int | str, new_size: int | str
) -> None:
    """Killed before any call that changes the folder: readers find the old export, the new one, or none."""
    outcomes = set()
    for num_calls in range(100):
        folder = tmp_path / str(num_calls)
        write(folder, OLD_TENSORS, max_shard_size=old_size)
        (folder / "config.json").write_text("{}")
        calls_left = num_calls

        def killable(call: Callable[..., object]) -> Callable[..., object]:
            def call_or_die(*args: Any, **kwargs: Any) -> object:  # noqa: ANN401
                nonlocal calls_left
                calls_left -= 1
                if calls_left < 0:
                    raise Killed
                return call(*args, **kwargs)

            return call_or_die

        with monkeypatch.context() as patched:
            for owner, name in (
                (Path, "replace"),
                (Path, "unlink"),
                (Path, "mkdir"),
                (os, "fsync"),
                (shutil, "rmtree"),
            ):
                patched.setattr(owner, name, killable(getattr(owner, name)))
            try:
                write(folder, NEW_TENSORS, max_shard_size=new_size)
            except Killed:
                is_done = False
            else:
                is_done = True
        assert (folder / "config.json").exists()
        actual = load_like_transformers(folder)
        if actual is None:
            with pytest.raises(CheckpointError, match=r"no weights.*\bmodel\.safetensors"):
                len(WeightReader(folder))
            outcomes.add("nothing")
        else:
            outcome = "old" if actual.keys() == OLD_TENSORS.keys() else "new"
            outcomes.add(outcome)
            assert_same(actual, OLD_TENSORS if outcome == "old" else NEW_TENSORS)
            assert_same(dict(WeightReader(folder)), actual)
        if is_done:
            assert outcome == "new"
            break
        write(folder, NEW_TENSORS, max_shard_size=new_size)
        names = {path.name for path in folder.iterdir()}
        assert names == {"config.json"} | {
            path.name for path in write(tmp_path / "fresh", NEW_TENSORS, max_shard_size=new_size)
        }
    assert is_done
    assert {"old", "new"} <= outcomes


def test_weights_in_the_other_format_are_not_left_beside_new_ones(tmp_path: Path) -> None:
    """A reader that prefers safetensors would load the old weights."""
    write(tmp_path, OLD_TENSORS)
    with pytest.raises(FileExistsError, match=r"\bformat\b.*\bmodel\.safetensors\b"):
        write(tmp_path, NEW_TENSORS, file_format="torch")
    assert_same(dict(WeightReader(tmp_path)), OLD_TENSORS)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"'model\.safetensors', 'pytorch_model\.bin'"):
        len(WeightReader(tmp_path))
    assert_same(dict(WeightReader(tmp_path / "model.safetensors")), OLD_TENSORS)


@pytest.mark.parametrize("size", [16, "5GB"])
def test_a_folder_in_the_place_of_a_file_stops_an_export_before_it_begins(tmp_path: Path, size: int | str) -> None:
    write(tmp_path, OLD_TENSORS, max_shard_size=16)
    (tmp_path / "model.safetensors").mkdir()
    (tmp_path / "model-00001-of-00004.safetensors").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=r"folders.*\bmodel(-00001-of-00004)?\.safetensors\b"):
        write(tmp_path, NEW_TENSORS, max_shard_size=size)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "model.safetensors").rmdir()
    (tmp_path / "model-00001-of-00004.safetensors").rmdir()
    assert_same(dict(WeightReader(tmp_path)), OLD_TENSORS)


@pytest.mark.parametrize(
    ("settings", "entries", "message"),
    [
        ({}, {}, "tensor.*/out"),
        ({}, {"a": torch.zeros(2, dtype=torch.complex128)}, "safetensors.*'a'.*complex128.*file_format=\"torch\""),
        ({"max_shard_size": 0}, OLD_TENSORS, r"max_shard_size.*\b0\b"),
        ({"max_shard_size": "5 apples"}, OLD_TENSORS, "max_shard_size.*'5 apples'"),
        ({"max_shard_size": "infGB"}, OLD_TENSORS, "max_shard_size.*'infGB'"),
        ({"max_shard_size": "0MB"}, OLD_TENSORS, "max_shard_size.*'0MB'"),
        ({}, {"__metadata__": torch.zeros(2)}, "safetensors.*'__metadata__'.*name"),
        ({}, {"a\udc80": torch.zeros(2)}, r"safetensors.*\budc80'.*Unicode"),
        ({"file_format": "npz"}, OLD_TENSORS, "file_format.*safetensors.*torch.*'npz'"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    tmp_path: Path, settings: dict[str, Any], entries: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out", entries, **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"a": torch.zeros(4)}, r"planned.*\bb, c\b"),
        (OLD_TENSORS | {"d": torch.zeros(1)}, "planned.*'d'"),
        ({"a": torch.zeros(5)}, r"'a'.*planned.*\b4\b.*\b5\b"),
        ({"a": torch.zeros(4).half()}, "'a'.*planned.*float32.*float16"),
    ],
)
def test_a_stream_that_is_not_the_planned_one_is_refused(
    tmp_path: Path, stream: dict[str, Tensor], message: str
) -> None:
    planned = {name: value.to("meta") for name, value in OLD_TENSORS.items()}
    with pytest.raises(ValueError, match=message), WeightWriter(tmp_path, planned=planned, max_shard_size=16) as writer:
        for name, value in stream.items():
            writer.add(name, value)
    assert list(tmp_path.iterdir()) == []


class LinearWithExtraState(nn.Linear):
    """A module with an extra state."""

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


def test_extra_states_are_left_out_with_a_warning_or_kept(tmp_path: Path) -> None:
    model = nn.Sequential(LinearWithExtraState(2, 2))
    model[0].state = {"count": 3}
    ema = ShardedEMA(model)
    with pytest.warns(UserWarning, match=r"\b0\._extra_state\b(?!, ).*file_format=\"torch\""):
        gather(ema, tmp_path / "safetensors")
    assert list(WeightReader(tmp_path / "safetensors")) == ["0.weight", "0.bias"]
    gather(ema, tmp_path / "torch", file_format="torch")
    files = WeightReader(tmp_path / "torch")
    assert files["0._extra_state"] == {"count": 3}
    assert files.meta_tensors["0._extra_state"] is None
    scatter(ema, tmp_path / "torch")
    model[0].state = Payload(tmp_path / "ran")
    with pytest.raises(CheckpointError, match=r"'0\._extra_state'.*\bPayload\b.*torch\.load\("):
        gather(ema, tmp_path / "torch", file_format="torch")
    model[0].state = torch.arange(3)
    gather(ema, tmp_path / "safetensors")
    assert_same(dict(WeightReader(tmp_path / "safetensors")), ema.full_state_dict())


@pytest.mark.world_size(2)
def test_a_folder_that_cannot_be_written_is_an_error_on_every_rank(tmp_path: Path) -> None:
    """The other ranks are in a collective call then."""
    _, ema = make_trained("fsdp2")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"/file\b.*\w+Error"):
        gather(ema, tmp_path / "file")
    gather(ema, tmp_path / "folder")
    assert (tmp_path / "folder" / "model.safetensors").exists()


@pytest.mark.world_size(2)
def test_pipeline_stages_are_not_written_over_each_other(tmp_path: Path) -> None:
    stage = nn.ModuleDict({f"layer{dist.get_rank()}": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"ranks 0 and 1\b.*layer0.*layer1"):
        gather(ShardedEMA(stage), tmp_path)


class FailingMapping(dict[str, Tensor]):
    """A mapping whose values cannot be read after a number of reads."""

    def __init__(self, full: dict[str, Tensor], *, reads: int) -> None:
        super().__init__(full)
        self.reads = reads

    def __getitem__(self, name: str) -> Tensor:
        self.reads -= 1
        if self.reads < 0:
            raise OSError("the disk is gone")
        return super().__getitem__(name)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("reads", [0, 5, 25])
def test_a_value_that_cannot_be_read_is_an_error_on_every_rank(reads: int) -> None:
    _, ema = make_trained("fsdp2")
    full = ema.full_state_dict()
    message = r"OSError\('the disk is gone'\).*\baverages\b" if reads > 20 else r"OSError\('the disk is gone'\)$"
    with pytest.raises(RuntimeError, match=message):
        ema.load_full_state_dict(FailingMapping(full, reads=reads))
    ema.load_full_state_dict(full)


@pytest.mark.world_size(2)
def test_files_of_another_model_or_none_are_refused_on_every_rank(tmp_path: Path) -> None:
    """Before any average changes."""
    _, ema = make_trained("fsdp2")
    before = ema.full_state_dict()
    with pytest.raises(RuntimeError, match=r"nowhere does not exist"):
        scatter(ema, tmp_path / "nowhere")
    wrong = {name: value for name, value in before.items() if name != "blocks.0.scale"} | {"other": torch.zeros(2)}
    wrong |= {"stats.bias": torch.zeros(7), "head.weight": torch.zeros(5, 6)}
    if before:
        write(tmp_path / "wrong", wrong)
    dist.barrier()
    with pytest.raises(ValueError, match=r"model\b.*\bblocks\.0\.scale\b") as caught:
        scatter(ema, tmp_path / "wrong")
    for difference in (
        r"unknown\D*\bother\b",
        r"missing\b.*\bblocks\.0\.scale\b",
        r"stats\.bias\b.*\(6,\).*\b7\b",
        r"tied\b.*\bhead\.weight\b",
    ):
        assert re.search(difference, str(caught.value))
    assert_bitwise_equal(ema.full_state_dict(), before)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int8])
def test_averages_are_not_loaded_from_complex_or_integer_files(dtype: torch.dtype, tmp_path: Path) -> None:
    """A cast would drop the imaginary part, or the fraction."""
    _, ema = make_trained("fsdp2")
    before = ema.full_state_dict()
    if before:
        write(tmp_path, {name: value.to(dtype) for name, value in before.items()})
    dist.barrier()
    with pytest.raises(ValueError, match=r"model\b.*dtype.*\bblocks\.0\.module\.bias\b.*floating.*\b\d+ more\)?$"):
        scatter(ema, tmp_path)
    assert_bitwise_equal(ema.full_state_dict(), before)
    in_bfloat16 = {name: value.bfloat16() if value.is_floating_point() else value for name, value in before.items()}
    if before:
        write(tmp_path, in_bfloat16)
    dist.barrier()
    scatter(ema, tmp_path)
    assert_bitwise_equal(
        ema.full_state_dict(), {n: old if "frozen" in n else in_bfloat16[n].to(old) for n, old in before.items()}
    )


@pytest.mark.world_size(2)
def test_only_the_first_rank_needs_to_know_the_folder(tmp_path: Path) -> None:
    _, ema = make_trained("fsdp2")
    before = ema.full_state_dict()
    folder: Any = tmp_path if dist.get_rank() == 0 else None
    gather(ema, folder)
    scatter(ema, folder)
    assert_bitwise_equal(ema.full_state_dict(), before)
    nowhere: Any = None
    with pytest.raises(ValueError, match="NoneType"):
        gather(ema, nowhere)
    with pytest.raises(RuntimeError, match="NoneType"):
        scatter(ema, nowhere)


def test_tied_tensors_from_files_may_hold_nan(tmp_path: Path) -> None:
    _, ema = make_trained("plain")
    full = ema.full_state_dict()
    full["embed.weight"][0] = float("nan")
    write(tmp_path, full)
    scatter(ema, tmp_path)
    assert ema.full_state_dict()["head.weight"].isnan().sum() == 6


class Payload:
    """Creates a folder when it is unpickled without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_crafted_torch_file_runs_nothing(tmp_path: Path, name: str) -> None:
    crafted = tmp_path / name
    torch.save({"a": torch.zeros(2), "b": Payload(tmp_path / "ran")}, crafted)
    with pytest.raises(CheckpointError, match=rf"{name}.*without running code: it holds"):
        dict(WeightReader(crafted))
    assert not (tmp_path / "ran").exists()
    torch.load(crafted, weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload works where nothing holds it back"
    crafted.write_bytes(pickle.dumps(Payload(tmp_path / "ran again")))
    with pytest.raises(CheckpointError):
        dict(WeightReader(crafted))
    assert not (tmp_path / "ran again").exists()


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "{outside}/secret.safetensors",
        "sub/../../secret.safetensors",
        "sub/inner.safetensors",
        "link.safetensors",
        "..\\secret.safetensors",
        "..",
        "",
        "nul\0.safetensors",
        "missing.safetensors",
        "sub",
        "pytorch_model.bin",
        7,
        None,
    ],
)
def test_an_index_cannot_lead_outside_of_its_folder(tmp_path: Path, file: object) -> None:
    """Nor to a file of another format, nor to a missing one."""
    folder = tmp_path / "export"
    (folder / "sub").mkdir(parents=True)
    secret = tmp_path / "secret.safetensors"
    for path in (secret, folder / "sub" / "inner.safetensors", folder / "..\\secret.safetensors"):
        save_file({"a": torch.ones(2)}, path)
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    (folder / "link.safetensors").symlink_to(secret)
    index = folder / "model.safetensors.index.json"
    named = file.format(outside=tmp_path) if isinstance(file, str) else file
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": named}}))
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        WeightReader(index)["a"]
    save_file({"a": torch.ones(2)}, folder / "fine.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "fine.safetensors"}}))
    assert torch.equal(WeightReader(index)["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}, r"\bx\.safetensors\b.*index\.json.*\bc$"),
        ({"a": "x.safetensors"}, r"\bx\.safetensors\b.*index\.json.*\bb$"),
        ([], r"model\.safetensors\.index\.json.*\w+Error"),
    ],
)
def test_an_index_and_its_files_must_agree(tmp_path: Path, weight_map: object, message: str) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        dict(WeightReader(tmp_path))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(2)], r"model\.pt.*\blist\b"),
        ({3: torch.ones(2)}, r"\bname\b.*model\.pt.*\b3\b"),
        ({"a": torch.ones(2, device="meta")}, r"'a'.*\bmeta\b"),
        ({"a": torch.ones(2).to_sparse()}, r"'a'.*torch\.sparse_coo"),
    ],
)
def test_a_torch_file_with_something_else_is_refused(tmp_path: Path, value: object, message: str) -> None:
    torch.save(value, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        dict(WeightReader(tmp_path / "model.pt"))


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "insert"]), st.integers(0, 2**20), st.binary(min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=4,
)


def mutated(original: bytes, mutations: list[tuple[str, int, bytes]]) -> bytes:
    content = bytearray(original)
    for kind, position, text in mutations:
        at = position % (len(content) + 1)
        match kind:
            case "flip":
                content[at : at + len(text)] = text
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + len(text)]
            case "insert":
                content[at:at] = text
    return bytes(content)


@pytest.fixture(params=["model-*.safetensors", "*.safetensors.index.json", "pytorch_model-*.bin"])
def export_file(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, bytes]:
    """One file of an export, and its bytes."""
    write(
        tmp_path,
        UNUSUAL_TENSORS,
        max_shard_size=100,
        file_format="torch" if request.param.endswith(".bin") else "safetensors",
    )
    path = min(tmp_path.glob(request.param))
    return path, path.read_bytes()


@given(mutations=MUTATIONS)
def test_damaged_files_are_clean_errors(
    export_file: tuple[Path, bytes], mutations: list[tuple[str, int, bytes]]
) -> None:
    """Or they load; a crash of the reader would end the test."""
    path, original = export_file
    path.write_bytes(mutated(original, mutations))
    with contextlib.suppress(CheckpointError):
        for value in WeightReader(path.parent).values():
            bits(value)


@pytest.mark.world_size(2)
def test_peak_memory_is_one_file_and_one_tensor(tmp_path: Path) -> None:
    """On the first rank, one file and one tensor (of a file that is read, its pages); elsewhere one tensor."""
    side, count = 3000, 6  # 36 MB each: beyond what malloc keeps for itself when it is freed
    tensor_bytes = side * side * 4
    layers = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(count)])
    for layer in layers:
        fully_shard(layer)
    ema = ShardedEMA(fully_shard(layers))
    gather(ema, tmp_path, max_shard_size=2 * tensor_bytes)  # the first time brings threads and buffers that stay
    is_first = dist.get_rank() == 0
    file_bytes = 2 * tensor_bytes if is_first else 0
    peak = peak_resident_memory(lambda: gather(ema, tmp_path, max_shard_size=2 * tensor_bytes))
    assert peak <= (file_bytes + tensor_bytes if is_first else 1.5 * tensor_bytes)
    dist.barrier()
    # Gloo's threads may hold the previous tensor a moment longer, and FSDP2 copies each shard.
    assert peak_resident_memory(lambda: scatter(ema, tmp_path)) <= file_bytes + 3 * tensor_bytes


@pytest.mark.world_size(2)
def test_gathering_waits_for_a_save_in_the_background(tmp_path: Path) -> None:
    """Both use the same group for checkpoints, the save in a thread."""
    model, ema = make_trained("fsdp2")
    for step in range(5):
        save({"model": model, "ema": ema}, tmp_path / "saved", step=step, block=False)
        gather(ema, tmp_path / "gathered")
    assert latest(tmp_path / "saved") == 4


class FailingExtraState(nn.Linear):
    """A module whose extra state one rank cannot give."""

    def __init__(self, failing_rank: int) -> None:
        super().__init__(3, 3)
        self.failing_rank = failing_rank

    def get_extra_state(self) -> object:
        if dist.get_rank() == self.failing_rank:
            raise LookupError("no state here")
        return torch.ones(2)


@pytest.mark.world_size(2)
def test_a_change_of_the_model_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(requires_grad=False)))
    ema = ShardedEMA(model, replicas="copy")
    if dist.get_rank() == 1:
        model.module[1].requires_grad_()
    with pytest.raises((CheckpointError, ValueError), match=r"1\.weight"):
        gather(ema, tmp_path)


@pytest.mark.world_size(2)
def test_a_tensor_that_does_not_fit_into_the_memory_of_one_rank_is_an_error_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks are in the collective calls of the next tensors then."""
    ema = ShardedEMA(fully_shard(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))))
    with monkeypatch.context() as patch:
        patch.setattr("ema_dist.averages.full_weights.to_cpu", lambda *_: 1 / 0)
        with pytest.raises(CheckpointError, match="ZeroDivisionError"):
            gather(ema, tmp_path)
    assert gather(ema, tmp_path) if dist.get_rank() == 0 else not gather(ema, tmp_path)


@pytest.mark.world_size(2)
def test_a_size_out_of_range_is_an_error_on_every_rank(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="infinity"):
        gather(ShardedEMA(nn.Linear(3, 3)), tmp_path, max_shard_size="9" * 400 + "GiB")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_extra_state_that_one_rank_cannot_give_is_an_error_on_all(rank: int, tmp_path: Path) -> None:
    ema = ShardedEMA(fully_shard(FailingExtraState(rank)))
    with pytest.raises(CheckpointError, match=rf"rank {rank}: .*no state here"):
        gather(ema, tmp_path)
    assert not [*tmp_path.iterdir()]
