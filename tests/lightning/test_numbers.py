"""Which steps are averaged and with which numbers; Lightning's own callback is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs lightning: tox -e frameworks")

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from ema_dist import Compensated, HalfLife
from ema_dist.lightning import EMAWeightAveraging
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING
from tests.support.lightning_runs import (
    Module,
    Recorder,
    assert_close,
    fit,
    full_weights,
    lightning_average,
    lightning_layouts,
    make_module,
    make_trainer,
    on_ranks,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"device": "cpu", "decay": 0.5},
    {"use_buffers": False, "update_every_n_steps": 3},
    {"update_every_n_steps": 2, "update_starting_at_step": 3},
    {"update_starting_at_step": 100},
    {"update_starting_at_epoch": 1},
    {"update_starting_at_epoch": 1, "update_every_n_steps": 3, "update_starting_at_step": 2},
    {"update_starting_at_epoch": 0, "update_every_n_steps": 0},
]


class Unfreezing(Module):
    """Freezes a layer in the first epoch."""

    def on_train_epoch_start(self) -> None:
        self.net[2].requires_grad_(requires_grad=self.current_epoch > 0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize(
    ("layout", "arguments", "trainer_settings"),
    [
        *(pytest.param("plain", ARGUMENTS, settings, marks=on_ranks(1), id=f"plain-{settings}") for settings in (
            {}, {"accumulate_grad_batches": 3, "val_check_interval": 2},
        )),
        pytest.param("ddp", ARGUMENTS[2:4], {}, marks=on_ranks(2), id="ddp"),
    ],
)  # fmt: skip
def test_with_lightnings_arguments_the_averages_equal_those_of_lightnings_callback(
    layout: str, arguments: list[dict[str, Any]], trainer_settings: dict[str, Any], tmp_path: Path
) -> None:
    """In each validation, in the sanity check before, and in the model after the fit."""
    for chosen in arguments:
        seen = []
        for callback_type in (callbacks.EMAWeightAveraging, EMAWeightAveraging):
            # DDP needs the gradients of all parameters that required one when it wrapped the module.
            recorder, module = Recorder(), (Module if layout == "ddp" else Unfreezing)(has_statistics=True)
            settings = {"max_epochs": 3, "limit_train_batches": 5, **trainer_settings}
            fit(make_trainer(layout, callback_type(**chosen), recorder, folder=tmp_path, **settings), module)
            seen.append([*recorder.in_validation, full_weights(module)])
        for ours, lightnings in zip(*reversed(seen), strict=True):
            assert_close(ours, lightnings)


@lightning_layouts("plain", "ddp", "fsdp1", "fsdp2")
def test_every_validation_sees_the_average_of_the_steps_before(layout: str, tmp_path: Path) -> None:
    recorder, ema, module = Recorder(), EMAWeightAveraging(decay=0.7), make_module(layout)
    fit(make_trainer(layout, recorder, ema, folder=tmp_path, num_sanity_val_steps=0, val_check_interval=2), module)
    for batch, seen in enumerate(recorder.in_validation):
        assert_close(seen, lightning_average(recorder.after_step[: 2 * (batch // 2 + 1)], 0.7))
    assert len(recorder.after_step) == len(recorder.in_validation) == 8
    assert ema.ema is not None
    assert (ema.ema.steps, ema.ema.updates) == (8, 7)
    assert_close(full_weights(module), lightning_average(recorder.after_step, 0.7))


class Overflowing(Module):
    """Has infinite gradients in some batches of each epoch, so that a gradient scaler skips their steps."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.settings = {optimizer: True}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx in (0, 2) else 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05, **self.settings)


@on_ranks(1)
@pytest.mark.parametrize("optimizer", ["fused", "foreach"])
@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_steps_that_the_gradient_scaler_skips_are_not_counted(
    optimizer: str, every_n_steps: int, tmp_path: Path
) -> None:
    recorder, ema = Recorder(), EMAWeightAveraging(decay=0.7, update_every_n_steps=every_n_steps)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))
    trainer = make_trainer("plain", ema, recorder, folder=tmp_path, plugins=[precision])
    fit(trainer, Overflowing(optimizer))
    real_steps = [weights for step, weights in enumerate(recorder.after_step) if step % 4 not in (0, 2)]
    assert trainer.global_step == 8
    assert len(real_steps) == 4
    assert ema.ema is not None
    assert ema.ema.steps == 4 // every_n_steps
    assert_close(full_weights(trainer.model), lightning_average(real_steps[::every_n_steps], 0.7))


class Adversarial(pl.LightningModule):
    """Two optimizers; which of them steps last depends on the batch, and the first skips every other batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(8, 1), nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        generator, discriminator = zip(self.optimizers(), (self.generator, self.discriminator), strict=True)
        for optimizer, net in ((discriminator,), (generator, discriminator))[batch_idx % 2]:
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
            optimizer.step()

    def validation_step(self, batch: Any, _: int) -> None:  # noqa: ANN401
        self.log("val_loss", nn.functional.mse_loss(self.generator(batch[0]), batch[1]))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.generator, self.discriminator)]


def is_of_generator(name: str, _: Tensor) -> bool:
    return name.startswith("generator")


@on_ranks(1)
@pytest.mark.parametrize("select", [None, is_of_generator])
def test_with_two_optimizers_each_batch_makes_one_update_after_both_have_stepped(select: Any, tmp_path: Path) -> None:  # noqa: ANN401
    recorder, ema, module = Recorder(), EMAWeightAveraging(decay=0.7, select=select), Adversarial()
    fit(make_trainer("plain", ema, recorder, folder=tmp_path), module)
    averaged = recorder.after_step if select is None else recorder.after_step[1::2]
    assert ema.ema is not None
    assert ema.ema.steps == len(averaged)
    expected = lightning_average(averaged, 0.7)
    assert_close(full_weights(module), {name: expected[name] for name in expected if select is None or "gen" in name})


@on_ranks(2)
def test_arguments_of_sharded_ema_have_the_same_effect_here(tmp_path: Path) -> None:
    """A law's time is in optimizer steps, whatever the interval; several tracks, and bfloat16 with residuals."""
    recorder = Recorder()
    laws = {"default": HalfLife(4), "short": 0.5}
    ema = EMAWeightAveraging(decay=laws, update_every_n_steps=3, dtype=torch.bfloat16, rounding=Compensated())
    fit(make_trainer("ddp", recorder, ema, folder=tmp_path), make_module("ddp"))
    assert ema.ema is not None
    full = {track: ema.ema.full_state_dict(track=track) for track in laws}
    if full["short"]:
        for track, decay in (("default", 0.5 ** (3 / 4)), ("short", 0.5)):
            assert_close(full[track], lightning_average(recorder.after_step[::3], decay), tolerance=1e-4)
