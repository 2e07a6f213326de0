"""`launch/train_diffusers.py`, a training loop like diffusers' own under accelerate, on two DDP ranks."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("diffusers", reason="needs diffusers: tox -e frameworks")

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import Tensor

import train_diffusers
from ema_dist.diffusers import EMAModel
from recipe.script import UsageError
from tests.support import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def prepare_accelerate() -> None:
    """Let the next Accelerator of this process start anew, in the process group that there is."""
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001  as accelerate's own tests do
    # accelerate asks for these, which torchrun sets, although the process group exists.
    os.environ |= {"LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def run(folder: Path, epochs: int, *options: str) -> None:
    """Runs the script in this process."""
    prepare_accelerate()
    arguments = ["train_diffusers.py", "--device", "cpu", "--epochs", str(epochs)]
    arguments += ["--output-dir", str(folder), *options]
    with mock.patch.object(sys, "argv", arguments), mock.patch.object(dist, "destroy_process_group"):
        train_diffusers.main()
    dist.barrier()


@pytest.mark.world_size(2, timeout=180)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    """Bit for bit: live weights, averages with their settings and count, and the pipeline, which holds the averages."""
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    run(unbroken, 3)
    run(resumed, 1)
    with pytest.raises(UsageError, match="--resume"):
        run(resumed, 3)
    run(resumed, 3, "--resume")
    averages = "checkpoint-3/unet_ema/diffusion_pytorch_model.safetensors"
    final = "unet/diffusion_pytorch_model.safetensors"
    for file in ("checkpoint-3/model.safetensors", averages, final):
        tensors, expected = load_file(resumed / file), load_file(unbroken / file)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in tensors.items())
    config = UNet2DModel.load_config(resumed / "checkpoint-3/unet_ema")
    assert config == UNet2DModel.load_config(unbroken / "checkpoint-3/unet_ema")
    assert (config["optimization_step"], config["decay"], config["use_ema_warmup"]) == (24, 0.99, True)
    pipeline, stored = load_file(resumed / final), load_file(resumed / averages)
    assert all(torch.equal(value, stored[name]) for name, value in pipeline.items())
    live = load_file(resumed / "checkpoint-3/model.safetensors")
    assert not all(torch.equal(value, stored[name]) for name, value in live.items())


@pytest.mark.world_size(2, timeout=120)
def test_the_script_of_the_page(tmp_path: Path) -> None:
    """As printed in docs/diffusers.md: the folder holds the averages after eight steps, not the live weights."""
    script = re.search(
        r'^```py title="train.py"\n(.*?)^```$', (ROOT / "docs/diffusers.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert script is not None
    prepare_accelerate()
    os.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(script[1], names)
    assert UNet2DModel.load_config("unet_ema")["optimization_step"] == names["ema_unet"].optimization_step == 8
    saved = [*UNet2DModel.from_pretrained("unet_ema").parameters()]
    live = [*names["unet"].parameters()]
    assert all(
        torch.equal(value, average) for value, average in zip(saved, names["ema_unet"].shadow_params, strict=True)
    )
    assert not any(torch.equal(value, weight) for value, weight in zip(saved, live, strict=True))


@pytest.mark.world_size(2, timeout=120)
@pytest.mark.parametrize("efficient_loading", ["plain", "meta"])
def test_accelerate_shards_the_model_after_construction(efficient_loading: str, tmp_path: Path) -> None:
    """FSDP2 by ``accelerator.prepare``, whose loading may pass through the meta device; then saved by all ranks."""
    prepare_accelerate()
    PartialState(cpu=True)
    # On a CPU, accelerate ignores FSDP without a word, and trains with DDP.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU  # noqa: SLF001
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=efficient_loading == "meta"
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    torch.manual_seed(0)
    unet = UNet2DModel(**train_diffusers.UNET)
    ema = EMAModel(unet, decay=0.9, model_cls=UNet2DModel, model_config=unet.config)
    unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters(), lr=1e-2))
    expected: list[Tensor] = []
    for decay in (0.0, 2 / 11, 3 / 12):
        accelerator.backward(unet(torch.ones(1, 1, 8, 8), torch.tensor([3])).sample.square().mean())
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        live = [parameter.full_tensor().double() for parameter in unet.parameters()]
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected or live, live, strict=True)]
    ema.save_pretrained(tmp_path)
    dist.barrier()
    for average, value in zip(UNet2DModel.from_pretrained(tmp_path).parameters(), expected, strict=True):
        torch.testing.assert_close(average.double(), value, rtol=1e-5, atol=1e-6)
