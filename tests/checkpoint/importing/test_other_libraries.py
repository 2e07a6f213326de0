"""diffusers' folders of averages, and exports that transformers, diffusers and timm load with their own code."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from ema_dist import HalfLife, ShardedEMA, checkpoint
from ema_dist.schedules.laws import Warmup
from tests.support.cli_runs import load_exported, run_ok
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal, make_net
from tests.support.timm_parts import timm_module

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


def average(model: nn.Module, root: Path) -> ShardedEMA:
    """Three updates with random weights, saved as a checkpoint."""
    ema = ShardedEMA(model, decay=HalfLife(1))
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        ema.update()
    checkpoint.save({"model": model, "ema": ema}, root, step=3)
    return ema


def tiny_unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def test_a_folder_of_diffusers_is_imported_with_its_counts(tmp_path: Path) -> None:
    unet = tiny_unet()
    utils = pytest.importorskip("diffusers.training_utils")
    averages = utils.EMAModel(
        unet.parameters(), decay=0.9, update_after_step=1, model_cls=type(unet), model_config=unet.config
    )
    for _ in range(3):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.normal_()
        averages.step(unet.parameters())
    averages.save_pretrained(tmp_path / "unet_ema")
    expected = dict(zip(unet.state_dict(), averages.shadow_params, strict=True))
    printed = json.loads(run_ok("import", tmp_path / "unet_ema", "-o", tmp_path / "out", "--json"))
    assert (printed["format"], printed["steps"], printed["updates"]) == ("diffusers", 3, 2)
    assert printed["law"] == repr(Warmup(0.9))
    assert_bitwise_equal(load_exported(tmp_path / "out"), expected)
    torch.save(unet.state_dict(keep_vars=True), tmp_path / "model.pt")
    options = ("--reference", tmp_path / "model.pt", "--format", "dcp")
    run_ok("import", tmp_path / "unet_ema", "-o", tmp_path / "dcp", *options)
    ema = ShardedEMA(unet, decay=Warmup(0.9), start=1)
    checkpoint.load({"ema": ema}, tmp_path / "dcp")
    assert (ema.steps, ema.updates) == (3, 2)
    assert_bitwise_equal(ema.full_state_dict(), expected)


def test_diffusers_loads_an_export(tmp_path: Path) -> None:
    unet = tiny_unet()
    ema = average(unet, tmp_path / "root")
    unet.save_config(tmp_path / "base")
    run_ok("export", tmp_path / "root", tmp_path / "out", "--layout", "diffusers", "--config", tmp_path / "base")
    assert_bitwise_equal(type(unet).from_pretrained(tmp_path / "out").state_dict(), ema.full_state_dict())


def test_transformers_loads_an_export(tmp_path: Path) -> None:
    """Tied weights included."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=4)
    model = transformers.GPT2LMHeadModel(config)
    ema = average(model, tmp_path / "root")
    model.config.save_pretrained(tmp_path / "base")
    run_ok("export", tmp_path / "root", tmp_path / "out", "--layout", "transformers", "--config", tmp_path / "base")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert_bitwise_equal(loaded.state_dict(), ema.full_state_dict())


def test_timm_loads_an_export(tmp_path: Path) -> None:
    net = make_net("plain")
    ema = average(net, tmp_path / "root")
    run_ok("export", tmp_path / "root", tmp_path / "out", "--layout", "timm")
    loaded = make_net("plain", seed=1)
    with timm_module("timm.models._helpers") as helpers:
        helpers.load_checkpoint(loaded, str(tmp_path / "out" / "model.safetensors"))
    assert_bitwise_equal(loaded.state_dict(), ema.full_state_dict())


def test_timm_creates_a_model_from_an_export_with_its_configuration(tmp_path: Path) -> None:
    """By ``create_model("local-dir:FOLDER", pretrained=True)``."""
    size = {"img_size": 32, "depth": 1, "embed_dim": 8, "num_heads": 2}
    with timm_module("timm.models.vision_transformer"):
        create_model = import_module("timm.models._factory").create_model
        model = create_model("vit_tiny_patch16_224", num_classes=3, **size)
        (tmp_path / "base").mkdir()
        save_config = import_module("timm.models._hub").save_config_for_hf
        save_config(model, str(tmp_path / "base" / "config.json"), model_args=size)
        ema = average(model, tmp_path / "root")
        run_ok("export", tmp_path / "root", tmp_path / "out", "--layout", "timm", "--config", tmp_path / "base")
        loaded = create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert_bitwise_equal(loaded.state_dict(), ema.full_state_dict())
