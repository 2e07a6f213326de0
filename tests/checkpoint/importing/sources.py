"""Files of averages that each package has written itself, and the averages that it held then."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_dist.schedules.laws import InverseGamma
from ema_dist.schedules.schedule import Schedule
from tests.support.layouts import Net, make_net, train_step
from tests.support.timm_parts import timm_module

LAYOUTS_OF_NET = ("plain", "ddp", "fsdp1", "fsdp2", "tp")
"""The layouts that can wrap the model of all sources."""


@dataclass(frozen=True)
class Source:
    """Averages in a file or folder."""

    path: Path
    averages: dict[str, Tensor]
    """By the names of the model."""
    steps: int
    law: Schedule | None = None


def net() -> Net:
    """The model whose averages the sources hold, as it was before it was trained."""
    return make_net(*LAYOUTS_OF_NET)


def reference_net() -> Net:
    """A model with other values, of which a reference is made."""
    return make_net(*LAYOUTS_OF_NET, seed=7)


def train(model: nn.Module, update: Callable[[], object], steps: int = 3) -> None:
    """Trains a model, and calls ``update`` after each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(steps):
        train_step(model, optimizer, step)
        update()


def averaged_model(folder: Path, wrap: Callable[[Net], nn.Module] = lambda model: model) -> Source:
    model = net()
    wrapped = wrap(model)
    averages = AveragedModel(wrapped, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, lambda: averages.update_parameters(wrapped))
    torch.save(averages.state_dict(), folder / "averages.pt")
    inner = averages.module.module if wrapped is not model else averages.module
    return Source(folder / "averages.pt", inner.state_dict(), steps=3)


def averaged_data_parallel(folder: Path) -> Source:
    return averaged_model(folder, nn.DataParallel)


def averaged_model_in_a_checkpoint(folder: Path) -> Source:
    source = averaged_model(folder)
    torch.save({"epoch": 1, "model": net().state_dict(), "ema": torch.load(source.path)}, source.path)
    return source


def lightning(folder: Path) -> Source:
    pl = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class LitNet(pl.LightningModule):
        forward = Net.forward

        def __init__(self) -> None:
            super().__init__()
            model = net()
            for name, child in model.named_children():
                self.add_module(name, child)
            self.register_buffer("mask", model.mask)
            self.register_buffer("scratch", torch.zeros(3), persistent=False)

        def training_step(self, batch: Tensor) -> Tensor:
            return self(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    averaging = callbacks.EMAWeightAveraging(decay=0.9)
    saving = callbacks.ModelCheckpoint(folder, filename="last", every_n_train_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=3,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[averaging, saving],
        )
        trainer.fit(model := LitNet(), torch.utils.data.DataLoader(torch.randn(24, 6), batch_size=8))
    return Source(folder / "last.ckpt", model.state_dict(), steps=3)  # the callback has left the averages in it


def timm(folder: Path) -> Source:
    model = net()
    arguments = argparse.Namespace(model="net", lr=0.05, opt_betas=[0.9, 0.95])
    optimizer = torch.optim.AdamW(model.parameters())
    with timm_module("timm.utils") as utils:
        averages = utils.ModelEmaV3(model, decay=0.9)
        train(model, lambda: averages.update(model))
        saver = utils.CheckpointSaver(model, optimizer, args=arguments, model_ema=averages, checkpoint_dir=str(folder))
        saver.save_checkpoint(0, metric=0.5)
    return Source(folder / "last.pth.tar", averages.module.state_dict(), steps=0)


def diffusers_state(folder: Path) -> Source:
    utils = pytest.importorskip("diffusers.training_utils")
    model = net()
    averages = utils.EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True, power=0.75)
    train(model, lambda: averages.step(model.parameters()))
    torch.save(averages.state_dict(), folder / "custom_checkpoint_0.pkl")
    names = [name for name, _ in model.named_parameters()]
    listed = dict(zip(names, averages.shadow_params, strict=True))
    return Source(folder / "custom_checkpoint_0.pkl", listed, steps=3, law=InverseGamma(0.9, power=0.75))


def ema_pytorch(folder: Path) -> Source:
    package = pytest.importorskip("ema_pytorch")
    model = net()
    averages = package.EMA(model, beta=0.9, update_after_step=0, update_every=1)
    train(model, averages.update)
    torch.save(averages.state_dict(), folder / "ema.pt")
    return Source(folder / "ema.pt", averages.ema_model.state_dict(), steps=3)


def post_hoc(folder: Path) -> Source:
    """A snapshot at a step that float16 rounds to 5000."""
    package = pytest.importorskip("ema_pytorch")
    model = net()
    settings = {"update_every": 1, "checkpoint_every_num_steps": "manual", "checkpoint_folder": str(folder)}
    averages = package.PostHocEMA(model, sigma_rels=(0.05, 0.1), **settings)
    train(model, averages.update)
    for snapshot in averages.ema_models:
        snapshot.step.fill_(5001)
    averages.checkpoint()
    stored = averages.ema_models[1].ema_model.state_dict()
    rounded = {name: value.half().to(value.dtype) for name, value in stored.items()}
    return Source(folder / "1.5001.pt", rounded, steps=5001)


def composer(folder: Path, *, active: bool = False) -> Source:
    """As Composer 0.32 writes it under DDP, with the counts that this package adds; Composer needs an older torch."""
    model = net()
    averages = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, lambda: averages.update_parameters(model))
    live, averaged = model.state_dict(), averages.module.state_dict()
    parameters = [f"module.{name}" for name, parameter in model.named_parameters() if parameter.requires_grad]
    buffers = [f"module.{name}" for name in live if name.startswith(("stats.running", "stats.num", "mask"))]
    buffers.append("module.scratch")
    in_model, beside = (averaged, live) if active else (live, averaged)
    stored = {f"module.{name}": value for name, value in (beside | {"scratch": torch.zeros(3)}).items()}
    state = {
        "repr": "EMA()",
        "ema_model": {
            "named_parameters_dict": {name: stored[name] for name in parameters},
            "named_buffers_dict": {name: stored[name] for name in buffers},
        },
        "ema_weights_active": active,
        "ema_started": True,
        "steps": 3,
        "updates": 3,
    }
    content = {
        "state": {
            "model": in_model,
            "algorithms": [("LowPrecisionLayerNorm", {"repr": ""}), ("EMA", state)],
            "timestamp": {"Timestamp": {"batch": 3, "total_wct": timedelta(seconds=1)}},
        },
        "rng": [{"python": (3, (1, 2), None), "numpy": ("MT19937", torch.arange(3).numpy(), 0, 0, 0.0)}],
    }
    torch.save(content, folder / "ep1-ba3-rank0.pt")
    names = {name.removeprefix("module.") for name in parameters + buffers}
    return Source(folder / "ep1-ba3-rank0.pt", {name: averaged[name] for name in averaged if name in names}, steps=3)


def composer_by_its_saver(folder: Path) -> Source:
    return composer(folder, active=True)


class EMAOptimizer(torch.optim.Optimizer):
    """Keeps ``ema_params`` as torchtitan's ``EMAOptimizersContainer`` does."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("ema_params", parameter.detach().clone())
                average.lerp_(parameter, 0.1)


def torchtitan(folder: Path) -> Source:
    model = net()
    averages = EMAOptimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    train(model, averages.step)
    flat = get_optimizer_state_dict(model, averages, options=StateDictOptions(flatten_optimizer_state_dict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        state = {**model.state_dict(), "ema_optimizer": flat, "train_state": {"step": 3, "ntokens_seen": 9}}
        dcp.save(state, checkpoint_id=folder / "step-3", no_dist=True)
    by_name = {name: averages.state[parameter].get("ema_params") for name, parameter in model.named_parameters()}
    return Source(folder / "step-3", {name: value for name, value in by_name.items() if value is not None}, steps=3)


def nemo(folder: Path) -> Source:
    """As NeMo 1 writes it beside a checkpoint."""
    source = averaged_model(folder)
    optimizer = {"opt": {}, "ema": tuple(source.averages.values()), "current_step": 3, "decay": 0.9}
    content = {"state_dict": source.averages, "optimizer_states": [optimizer], "epoch": 0, "global_step": 3}
    torch.save(content, folder / "run-EMA.ckpt")
    return Source(folder / "run-EMA.ckpt", source.averages, steps=3)


SOURCES: dict[str, tuple[str, Callable[[Path], Source]]] = {
    "averaged_model": ("averaged-model", averaged_model),
    "averaged_data_parallel": ("averaged-model", averaged_data_parallel),
    "averaged_model_in_a_checkpoint": ("averaged-model", averaged_model_in_a_checkpoint),
    "lightning": ("lightning", lightning),
    "timm": ("timm", timm),
    "diffusers_state": ("diffusers", diffusers_state),
    "ema_pytorch": ("ema-pytorch", ema_pytorch),
    "post_hoc": ("ema-pytorch", post_hoc),
    "composer": ("composer", composer),
    "composer_by_its_saver": ("composer", composer_by_its_saver),
    "torchtitan": ("torchtitan", torchtitan),
    "nemo": ("nemo", nemo),
}
"""The format of each source, and the function that writes it into a folder."""
