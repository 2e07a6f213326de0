"""The names of weight files, which weights an export may replace, and what a failed one leaves."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.gathering import gather
from ema_dist.checkpoint.weights.config_files import config_files
from ema_dist.checkpoint.weights.formats import FileFormat
from ema_dist.checkpoint.weights.reader import WeightReader
from ema_dist.checkpoint.weights.weight_writer import WeightWriter
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal, make_trained

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


TENSORS = {name: torch.full((4,), float(index)) for index, name in enumerate(("a", "b", "c"))}
OTHERS = {"weight": torch.ones(2)}
FORMATS = pytest.mark.parametrize("file_format", ["safetensors", "torch"])


def write(folder: Path, tensors: dict[str, Tensor], **settings: object) -> list[str]:
    planned = {name: value.to("meta") for name, value in tensors.items()}
    with WeightWriter(folder, planned=planned, **settings) as writer:  # pyrefly: ignore[bad-argument-type]
        for name, value in tensors.items():
            writer.add(name, value)
    return [path.name for path in writer.paths]


def write_as_other_programs_do(folder: Path, file_format: FileFormat, name: str, *, sharded: bool) -> dict[str, bytes]:
    """Writes weights without this package, perhaps with an index, and returns the content of each file."""
    folder.mkdir(exist_ok=True)
    stem, _, suffix = name.rpartition(".")
    file = folder / (f"{stem}-00001-of-00001.{suffix}" if sharded else name)
    if file_format == "safetensors":
        save_file(OTHERS, file, metadata={"format": "pt"})
    else:
        torch.save(OTHERS, file)
    if sharded:
        index = {"metadata": {"total_size": 8}, "weight_map": {"weight": file.name}}
        (folder / f"{name}.index.json").write_text(json.dumps(index))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("file_format", "name"),
    [
        ("safetensors", "diffusion_pytorch_model.safetensors"),
        ("safetensors", "odd {name}.safetensors"),
        ("torch", "adapter.bin"),
        ("torch", "weights.pt"),
    ],
)
def test_names_of_one_file_and_of_several(file_format: FileFormat, name: str, tmp_path: Path) -> None:
    stem, _, suffix = name.rpartition(".")
    assert write(tmp_path / "one", TENSORS, file_format=file_format, name=name) == [name]
    assert write(tmp_path / "many", TENSORS, file_format=file_format, name=name, max_shard_size=16) == [
        *[f"{stem}-{index:05}-of-00003.{suffix}" for index in (1, 2, 3)],
        f"{name}.index.json",
    ]
    for folder in ("one", "many"):
        assert_bitwise_equal(dict(WeightReader(tmp_path / folder)), TENSORS)


def test_exports_of_different_names_share_a_folder(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    write(tmp_path, OTHERS, name="other.safetensors", max_shard_size=4)
    assert_bitwise_equal(load_file(tmp_path / "model.safetensors"), TENSORS)
    assert_bitwise_equal(dict(WeightReader(tmp_path / "other.safetensors")), OTHERS)
    with pytest.raises(FileExistsError, match=r"\bformat\b.*other\.safetensors"):
        write(tmp_path, OTHERS, file_format="torch", name="other.bin")


@pytest.mark.parametrize(
    "name", ["sub/model.safetensors", "..", ".safetensors", "model", "model.bin", "model-00001-of-00002.safetensors"]
)
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.safetensors"):
        write(tmp_path / "out", TENSORS, name=name)
    assert not (tmp_path / "out").exists()


@FORMATS
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("size", [16, "5GiB"])
def test_weights_by_others_are_overwritten_by_force_only(
    file_format: FileFormat, size: int | str, tmp_path: Path, *, sharded: bool
) -> None:
    name = "model.safetensors" if file_format == "safetensors" else "pytorch_model.bin"
    before = write_as_other_programs_do(tmp_path, file_format, name, sharded=sharded)
    with pytest.raises(FileExistsError, match=r"did not write.*force=True"):
        write(tmp_path, TENSORS, file_format=file_format, max_shard_size=size)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    written = write(tmp_path, TENSORS, file_format=file_format, max_shard_size=size, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(written)
    for own_size in (16, "5GiB"):  # what the package wrote itself, it replaces without being forced
        write(tmp_path, OTHERS, file_format=file_format, max_shard_size=own_size)
    assert_bitwise_equal(dict(WeightReader(tmp_path)), OTHERS)


def test_a_file_that_cannot_be_read_counts_as_one_by_others(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(FileExistsError, match=r"model\.safetensors"):
        write(tmp_path, TENSORS)


@pytest.mark.world_size(2)
def test_gather_names_its_files_and_keeps_weights_by_others(tmp_path: Path) -> None:
    _, ema = make_trained("fsdp2")
    full = ema.full_state_dict()
    name = "diffusion_pytorch_model.safetensors"
    paths = gather(ema, tmp_path / "named", name=name, max_shard_size=400)
    if full:
        assert paths[-1].name == f"{name}.index.json"
        assert_bitwise_equal(dict(WeightReader(tmp_path / "named")), full)
        write_as_other_programs_do(tmp_path / "others", "safetensors", name, sharded=False)
    with pytest.raises(CheckpointError, match=name):
        gather(ema, tmp_path / "others", name=name)
    if full:
        assert_bitwise_equal(load_file(tmp_path / "others" / name), OTHERS)
    gather(ema, tmp_path / "others", name=name, force=True)
    if full:
        assert_bitwise_equal(load_file(tmp_path / "others" / name), full)


def test_a_failed_export_keeps_weights_by_others_and_leaves_no_folder(tmp_path: Path) -> None:
    before = write_as_other_programs_do(tmp_path / "others", "safetensors", "model.safetensors", sharded=True)

    def write_interrupted(folder: Path) -> None:
        planned = {name: value.to("meta") for name, value in TENSORS.items()}
        with (
            pytest.raises(KeyboardInterrupt),
            WeightWriter(folder, planned=planned, max_shard_size=16, force=True) as out,
        ):
            out.add("a", TENSORS["a"])
            raise KeyboardInterrupt

    for folder in (tmp_path / "new" / "export", tmp_path / "others"):
        write_interrupted(folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "others").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["others"]
    (tmp_path / "empty").mkdir()
    write_interrupted(tmp_path / "empty" / "export")
    assert [*(tmp_path / "empty").iterdir()] == []


@pytest.mark.usefixtures("sigint_interrupts")
def test_ctrl_c_does_not_end_an_export_between_old_and_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, OTHERS, max_shard_size=4)
    unlink = Path.unlink

    def unlink_interrupted(path: Path) -> None:
        unlink(path)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", unlink_interrupted)
        write(tmp_path, TENSORS, max_shard_size=16)
    assert_bitwise_equal(dict(WeightReader(tmp_path)), TENSORS)
    assert len([*tmp_path.iterdir()]) == 4


def test_a_file_is_read_in_the_order_in_which_it_was_written(tmp_path: Path) -> None:
    tensors = {name: torch.ones(2) for name in ("layers.10.weight", "embed.weight", "layers.2.weight")}
    write(tmp_path, tensors)
    assert [*WeightReader(tmp_path)] == [*tensors]


def test_configuration_is_copied_again_by_each_export(tmp_path: Path) -> None:
    source = tmp_path / "source"
    contents = {name: name.encode() for name in ("config.json", "merges.txt", "tokenizer.model", "chat_template.jinja")}
    left_out = {"model.safetensors.index.json": b"{}", "training_args.bin": b"", "code.py": b"", "model.ckpt": b""}
    write(source, OTHERS)
    for name, content in (contents | left_out).items():
        (source / name).write_bytes(content)
    out = tmp_path / "out"
    for _ in range(2):
        written = write(out, TENSORS, copied=config_files(source))
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.name not in written} == contents
    for folder in (tmp_path / "nowhere", out / "config.json"):
        with pytest.raises(CheckpointError, match=r"config\.json.*no files"):
            config_files(folder)


@FORMATS
@pytest.mark.parametrize("size", [16, "5GiB"])
def test_copies_follow_their_source_until_somebody_edits_them(
    file_format: FileFormat, size: int | str, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    settings = {"file_format": file_format, "max_shard_size": size}

    def export(tensors: dict[str, Tensor], **more: object) -> None:
        write(out, tensors, copied=config_files(source), **settings, **more)

    (source / "config.json").write_text('{"layers": 1, "type": "net"}')
    (source / "vocab.txt").write_text("a\nb\n")
    export(TENSORS)
    (source / "config.json").write_text('{"layers": 2, "type": "net"}')
    export(TENSORS)
    assert json.loads((out / "config.json").read_text())["layers"] == 2
    write(out, TENSORS, **settings)  # without configuration, the copies stay and are still known as such
    (source / "config.json").write_text('{"layers": 3, "type": "net"}')
    export(TENSORS)

    edited = {"config.json": '{"layers": 3, "type": "net", "cache": true}', "vocab.txt": "a\nc\n"}
    for name, content in edited.items():
        (out / name).write_text(content)
    with pytest.raises(FileExistsError, match=r"configuration.*config\.json.*'cache'.*vocab\.txt.*line 2\b") as error:
        export(OTHERS)
    assert not re.search(r"weights|'layers'", str(error.value))
    assert {name: (out / name).read_text() for name in edited} == edited
    assert_bitwise_equal(dict(WeightReader(out)), TENSORS)
    write(out, OTHERS, **settings)
    export(TENSORS, force=True)
    assert [(out / name).read_text() for name in edited] == [(source / name).read_text() for name in edited]


def test_weights_and_configuration_by_others_are_named_together(tmp_path: Path) -> None:
    """A user who passes --force because of the weights must know that it replaces the configuration too."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    write_as_other_programs_do(tmp_path / "out", "safetensors", "model.safetensors", sharded=False)
    (tmp_path / "out" / "config.json").mkdir()
    copied = config_files(tmp_path / "source")
    with pytest.raises(FileExistsError, match=r"folders.*config\.json"):
        write(tmp_path / "out", TENSORS, copied=copied, force=True)
    (tmp_path / "out" / "config.json").rmdir()
    (tmp_path / "out" / "config.json").write_text("[1]")
    with pytest.raises(FileExistsError, match=r"weights.*model\.safetensors.*configuration.*config\.json.*line 1\b"):
        write(tmp_path / "out", TENSORS, copied=copied)


def test_an_export_beside_its_configuration_leaves_that_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, TENSORS, copied=config_files(tmp_path))
    assert (tmp_path / "config.json").read_text() == "{}"
