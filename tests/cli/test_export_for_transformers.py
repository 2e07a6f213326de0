"""`export --config`: `from_pretrained` of transformers loads the folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ema_dist import ShardedEMA, checkpoint
from tests.support.cli_runs import load_exported, make_checkpoint, run, run_ok
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


def test_configuration_and_tokenizer_lie_beside_the_weights(tmp_path: Path) -> None:
    root, _, ema = make_checkpoint(tmp_path / "root")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "net"}')
    (source / "tokenizer.model").write_bytes(b"\x00")
    save_file({"weight": torch.ones(1)}, source / "model.safetensors")
    out = run_ok("export", root, tmp_path / "out", "--config", source)
    assert all(str(tmp_path / "out" / name) in out for name in ("model.safetensors", "config.json", "tokenizer.model"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "net"}
    assert_bitwise_equal(load_exported(tmp_path / "out"), ema.full_state_dict())


def test_weights_by_others_are_kept_without_force(tmp_path: Path) -> None:
    root, _, ema = make_checkpoint(tmp_path / "root")
    name = "diffusion_pytorch_model.safetensors"
    save_file({"weight": torch.ones(1)}, tmp_path / name)
    result = run("export", root, tmp_path, "--name", name)
    assert result.exit_code == 1
    assert re.search(rf"{name}.*--force", result.stderr)
    assert load_file(tmp_path / name).keys() == {"weight"}
    run_ok("export", root, tmp_path, "--name", name, "--force")
    assert_bitwise_equal(load_file(tmp_path / name), ema.full_state_dict())


def test_edited_configuration_is_kept_without_force(tmp_path: Path) -> None:
    root, *_ = make_checkpoint(tmp_path / "root")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "net"}')
    for _ in range(2):
        run_ok("export", root, out, "--config", source)
    (out / "config.json").write_text('{"model_type": "net", "use_cache": false}')
    result = run("export", root, out, "--config", source)
    assert result.exit_code == 1
    assert re.search(r"config\.json.*'use_cache'.*--config.*--force", result.stderr)
    assert "model.safetensors" not in result.stderr
    run_ok("export", root, out)
    run_ok("export", root, out, "--config", source, "--force")
    assert json.loads((out / "config.json").read_text()) == {"model_type": "net"}


@pytest.mark.parametrize("size", ["5GiB", "2KiB"])
def test_unedited_configuration_is_replaced_by_an_export_of_another_name(size: str, tmp_path: Path) -> None:
    root, *_ = make_checkpoint(tmp_path / "root")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    other_name = ("--name", "diffusion_pytorch_model.safetensors")
    for version, options in enumerate([(), other_name, (), other_name]):
        (source / "config.json").write_text(f'{{"version": {version}}}')
        run_ok("export", root, out, "--config", source, "--max-shard-size", size, *options)
        run_ok("export", root, out, "--max-shard-size", size)
        assert json.loads((out / "config.json").read_text()) == {"version": version}
    (out / "config.json").write_text('{"version": 0}')
    assert run("export", root, out, "--config", source).exit_code == 1


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    root, *_ = make_checkpoint(tmp_path / "root")
    result = run("export", root, tmp_path / "out", "--config", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert re.search(r"config\.json in .*nowhere", result.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["5GiB", "2KiB"])
def test_transformers_loads_an_export(size: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    config.save_pretrained(tmp_path / "source")
    ema = ShardedEMA(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=1)
    arguments = ["--config", tmp_path / "source", "--max-shard-size", size]
    run_ok("export", tmp_path / "root", tmp_path / "out", *arguments)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert_bitwise_equal(loaded.state_dict(), ema.full_state_dict())
