"""Runs of Lightning's real Trainer on a CPU: a small module, its data, its strategies, and what its hooks see."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning", reason="needs lightning: tox -e frameworks")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

on_ranks = partial(pytest.mark.world_size, timeout=180)

LAYOUTS = ("plain", "ddp", "fsdp1", "fsdp2", "fsdp2-full")
"""Layouts whose checkpoints can be saved on a CPU: torch crashes there when it saves full checkpoints of FSDP1."""


def lightning_layouts(*names: str) -> pytest.MarkDecorator:
    """Parametrizes `layout` by name, each on as many ranks as it needs."""
    ranks = {"plain": 1}
    return pytest.mark.parametrize(
        "layout", [pytest.param(name, marks=on_ranks(ranks.get(name, 2))) for name in names or LAYOUTS]
    )


class Module(pl.LightningModule):
    """A linear regression with a hidden layer, statistics, and a buffer of integers."""

    def __init__(self, *, has_statistics: bool = False, learning_rate: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 15), nn.BatchNorm1d(15) if has_statistics else nn.ReLU(), nn.Linear(15, 1)
        )
        self.learning_rate = learning_rate
        self.losses: list[float] = []

    def training_step(self, batch: Any, _: int) -> Tensor:  # noqa: ANN401  Lightning's signatures
        return self.loss(batch)

    def validation_step(self, batch: Any, _: int) -> None:  # noqa: ANN401
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("val_loss", loss, sync_dist=True)

    def test_step(self, batch: Any, _: int) -> None:  # noqa: ANN401, PT019  not a test
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def loss(self, batch: Any) -> Tensor:  # noqa: ANN401
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class ShardedModule(Module):
    """The same under FSDP2: ModelParallelStrategy expects `configure_model` to wrap the module."""

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Sequential) and not hasattr(self.net, "unshard"):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=mesh)


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 on a CPU: Lightning refuses only FSDPStrategy itself there, and passes no device that torch accepts."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        original = FullyShardedDataParallel.__init__

        def init(self: Any, *arguments: Any, **settings: Any) -> None:  # noqa: ANN401
            original(self, *arguments, **settings | {"device_id": settings.get("device_id") or torch.device("cpu")})

        FullyShardedDataParallel.__init__ = init
        try:
            return super()._setup_model(model)
        finally:
            FullyShardedDataParallel.__init__ = original


def make_strategy(layout: str) -> Any:  # noqa: ANN401
    """The strategy of a layout on a CPU."""
    if layout == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if layout.startswith("fsdp2"):
        return ModelParallelStrategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            save_distributed_checkpoint=layout == "fsdp2",
            process_group_backend="gloo",
        )
    if layout == "fsdp1":
        policy = ModuleWrapPolicy({nn.Linear})
        return CPUFSDPStrategy(auto_wrap_policy=policy, process_group_backend="gloo", state_dict_type="sharded")
    return "auto"


def make_module(layout: str = "plain", **settings: Any) -> Module:  # noqa: ANN401
    """A module on this rank, with the same weights on every rank."""
    return (ShardedModule if layout.startswith("fsdp2") else Module)(**settings)


def make_trainer(layout: str, *callbacks: Callback, folder: Path, **settings: Any) -> pl.Trainer:  # noqa: ANN401
    """A Trainer on this rank; `settings` override the defaults below."""
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "limit_train_batches": 4,
        "limit_val_batches": 2,
        "limit_test_batches": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks),
    }
    devices = 1 if layout == "plain" else dist.get_world_size()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=make_strategy(layout),
            callbacks=list(callbacks),
            default_root_dir=folder,
            **defaults | settings,
        )


def make_loader(seed: int = 1, *, samples: int = 64) -> DataLoader[Any]:
    """A loader of 64 inputs and their sums, of which `samples` are different."""
    inputs = torch.randn(samples, 8, generator=torch.Generator().manual_seed(seed)).repeat(64 // samples, 1)
    return DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=4)


def fit(trainer: pl.Trainer, module: pl.LightningModule, *, samples: int = 64, **settings: Any) -> None:  # noqa: ANN401
    """Train, and ignore the warnings of Lightning and torch.

    Pass samples=1, which makes all batches equal, to resume inside an epoch: Lightning restarts the loader there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, make_loader(samples=samples), make_loader(2), **settings)


def validate(trainer: pl.Trainer, module: pl.LightningModule, **settings: Any) -> float:  # noqa: ANN401
    """The validation loss."""
    return _evaluate(trainer.validate, module, **settings)["val_loss"]


def test(trainer: pl.Trainer, module: pl.LightningModule) -> float:
    """The test loss, on the same data."""
    return _evaluate(trainer.test, module)["test_loss"]


test.__test__ = False  # type: ignore[attr-defined]  pytest does not collect it


def _evaluate(evaluate: Any, module: pl.LightningModule, **settings: Any) -> dict[str, float]:  # noqa: ANN401
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate(module, make_loader(2), verbose=False, **settings)[0]


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Full copies of the tensors in the model by canonical name, on every rank."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.detach().clone() for name, tensor in weights.items() if isinstance(tensor, Tensor)}


class Recorder(Callback):
    """Records full weights: the live ones after each batch with a step, and those in the model during validation."""

    def __init__(self) -> None:
        self.after_step: list[dict[str, Tensor]] = []
        self.in_validation: list[dict[str, Tensor]] = []
        self._step = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.after_step.append(full_weights(trainer.strategy.model))

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        self.in_validation.append(full_weights(trainer.strategy.model))


def lightning_average(weights: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The oracle: the average of floating tensors in float64, which begins with a copy."""
    average: dict[str, Tensor] = {}
    for full in weights:
        for name, live in full.items():
            if live.is_floating_point():
                average[name] = average.get(name, live.double()) * decay + live.double() * (1 - decay)
    return average


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Each floating tensor of `right` is in `left`, within the tolerance."""
    for name, expected in right.items():
        if expected.is_floating_point():
            torch.testing.assert_close(left[name].double(), expected.double(), rtol=tolerance, atol=tolerance, msg=name)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same names, and bit-identical tensors."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different
