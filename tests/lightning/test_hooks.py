"""Which weights are in the model at which hook, after which error, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs lightning: tox -e frameworks")

import lightning.pytorch as pl
import pytorch_lightning
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceXLAStrategy, XLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ema_dist import Offloaded, ShardedEMA
from ema_dist.lightning import EMAWeightAveraging, failures
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING
from tests.support.lightning_runs import (
    Module,
    Recorder,
    ShardedModule,
    assert_close,
    assert_same,
    fit,
    full_weights,
    lightning_average,
    lightning_layouts,
    make_trainer,
    on_ranks,
    test,
    validate,
)
from tests.support.quantized import Quantized

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


class Hooks:
    """Mixed into a module: records the weights in its own hooks, and raises in the validation after some step."""

    raises_at: int | None = None
    records = True

    def setup(self, stage: str) -> None:  # noqa: ARG002  Lightning's signature
        self.seen: list[tuple[str, dict[str, Tensor]]] = []

    def see(self, hook: str) -> None:
        if self.records:
            self.seen.append((hook, full_weights(self.trainer.strategy.model)))  # type: ignore[attr-defined]

    def on_validation_start(self) -> None:
        self.see("on_validation_start")

    def on_validation_epoch_end(self) -> None:
        self.see("on_validation_epoch_end")
        if self.trainer.global_step == self.raises_at:  # type: ignore[attr-defined]
            raise RuntimeError("validation failed")

    def on_train_epoch_start(self) -> None:
        self.see("on_train_epoch_start")

    def on_test_start(self) -> None:
        self.see("on_test_start")


class ModuleWithHooks(Hooks, Module):
    """A module for every layout but FSDP2."""


class ShardedModuleWithHooks(Hooks, ShardedModule):
    """A module for FSDP2."""


def make_module(layout: str, raises_at: int | None = None) -> Any:  # noqa: ANN401
    module = (ShardedModuleWithHooks if layout.startswith("fsdp2") else ModuleWithHooks)()
    module.raises_at = raises_at
    return module


@lightning_layouts("plain", "ddp", "fsdp1", "fsdp2")
def test_one_trainer_validates_fits_validates_and_tests(layout: str, tmp_path: Path) -> None:
    """Hooks of the module see averages in validation and in tests, the live weights in training."""
    recorder, ema, module = Recorder(), EMAWeightAveraging(decay=0.7), make_module(layout)
    # After a validation, Lightning does not wrap the root in FSDP1 again, and torch cannot gather weights in training.
    module.records = layout != "fsdp1"
    trainer = make_trainer(layout, ema, *([recorder] if module.records else []), folder=tmp_path)
    first = validate(trainer, module)
    fit(trainer, module)
    seen, loss = dict(module.seen), trainer.callback_metrics["val_loss"].item()
    assert loss < first
    assert validate(trainer, module) == pytest.approx(loss, abs=1e-6)
    assert test(trainer, module) == pytest.approx(loss, abs=1e-6)
    if module.records:
        assert_same(seen["on_train_epoch_start"], recorder.after_step[3])
        average = lightning_average(recorder.after_step, 0.7)
        for weights in (
            seen["on_validation_start"],
            seen["on_validation_epoch_end"],
            dict(module.seen)["on_test_start"],
        ):
            assert_close(weights, average)


@lightning_layouts("plain", "ddp", "fsdp1", "fsdp2")
def test_after_an_exception_in_validation_the_model_and_the_file_hold_live_weights(layout: str, tmp_path: Path) -> None:
    """Bit for bit; the file resumes, with a new callback or the same one."""
    recorder, ema = Recorder(), EMAWeightAveraging(decay=0.7)
    saver = ModelCheckpoint(tmp_path / "files", filename="{step}", save_on_exception=True, every_n_epochs=10)
    module = make_module(layout, raises_at=4)
    with pytest.raises(RuntimeError, match=r"^validation failed$"):
        fit(make_trainer(layout, recorder, ema, saver, folder=tmp_path), module, samples=1)
    assert torch.is_grad_enabled()
    if layout in ("plain", "ddp"):
        assert_same(full_weights(module), recorder.after_step[-1])
    (path,) = (tmp_path / "files").iterdir()
    unbroken, resumed = Recorder(), Recorder()
    fit(make_trainer(layout, EMAWeightAveraging(decay=0.7), unbroken, folder=tmp_path), make_module(layout), samples=1)
    fit(make_trainer(layout, resumed, ema, folder=tmp_path), make_module(layout), samples=1, ckpt_path=path)
    assert_same(resumed.after_step[-1], unbroken.after_step[-1])
    assert_same(resumed.in_validation[-1], unbroken.in_validation[-1])


class FailsOnRank1First(Module):
    """Raises on rank 1, and on rank 0 only after rank 1 has given up."""

    file: Path

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        if self.trainer.global_step == 4:
            while self.trainer.global_rank == 0 and not self.file.exists():
                time.sleep(0.05)
            raise ValueError("mine")
        super().validation_step(batch, index)


@on_ranks(2)
def test_an_exception_on_one_rank_is_raised_without_waiting_for_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also with a checkpoint that is due then, which all ranks would have to save."""
    monkeypatch.setattr(failures, "PATIENCE", 1.0)
    saver = ModelCheckpoint(tmp_path / "files", save_on_exception=True, every_n_epochs=10)
    module = FailsOnRank1First()
    module.file = tmp_path / "gave up"
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^mine\b") as raised:
        fit(make_trainer("ddp", EMAWeightAveraging(decay=0.7), saver, folder=tmp_path), module, samples=1)
    module.file.touch()
    assert time.monotonic() - start < 100, "the timeout is 300 s"
    assert "no checkpoint is saved" in raised.value.__notes__[0]
    assert not (tmp_path / "files").exists()


@on_ranks(1)
def test_a_second_fit_begins_with_new_averages_of_the_weights_in_the_model(tmp_path: Path) -> None:
    """With another Trainer and with the same one, as with Lightning's callback."""
    ema, module, recorder = EMAWeightAveraging(decay=0.7), Module(), Recorder()
    fit(make_trainer("plain", ema, folder=tmp_path), module)
    trainer = make_trainer("plain", recorder, ema, folder=tmp_path, max_epochs=1)
    for steps in (4, 8):
        fit(trainer, module)
        assert ema.ema is not None
        assert ema.ema.steps == 4
        assert trainer.global_step == steps
        assert_close(full_weights(module), lightning_average(recorder.after_step[-4:], 0.7))
        trainer.fit_loop.max_epochs = 2


class Adding(Callback):
    """Adds a callback after the fit has begun."""

    def on_train_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        trainer.callbacks.append(EMAWeightAveraging())


class OwnAveraging(callbacks.WeightAveraging):
    """A user's subclass of Lightning's base class, with another name than ours."""


class Copying(Callback):
    """Copies the module while the callback is active."""

    def on_train_start(self, _: pl.Trainer, module: pl.LightningModule) -> None:
        copied = copy.deepcopy(module)
        assert_same(full_weights(copied), full_weights(module))
        copied.on_save_checkpoint({"callbacks": {}})


def test_a_module_can_be_copied_in_a_fit(tmp_path: Path) -> None:
    fit(make_trainer("plain", EMAWeightAveraging(), Copying(), folder=tmp_path), Module())


class AddingEarly(Callback):
    """Adds a callback that gets no `setup`."""

    def on_fit_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        trainer.callbacks.append(EMAWeightAveraging(decay=0.7))


def test_a_callback_added_when_the_fit_starts_saves_averages(tmp_path: Path) -> None:
    """Also with ``save_weights_only``, for which Lightning calls only the module's hook."""
    recorder, saver = Recorder(), ModelCheckpoint(tmp_path, filename="{step}", save_weights_only=True)
    fit(make_trainer("plain", AddingEarly(), recorder, saver, folder=tmp_path), Module())
    saved = torch.load(tmp_path / "step=8.ckpt")["state_dict"]
    assert_close(saved, lightning_average(recorder.after_step, 0.7))


@pytest.mark.parametrize(
    "others",
    [[OwnAveraging()], [callbacks.StochasticWeightAveraging(swa_lrs=0.1)], [Adding()]],
    ids=["two", "swa", "added"],
)
def test_a_second_averaging_callback_and_one_added_during_the_fit_are_refused(
    others: list[Callback], tmp_path: Path
) -> None:
    mine = [] if isinstance(others[0], Adding) else [EMAWeightAveraging()]
    with pytest.raises(MisconfigurationException, match="EMAWeightAveraging"):
        fit(make_trainer("plain", *mine, *others, folder=tmp_path), Module())


@pytest.mark.parametrize("other", [EMAWeightAveraging, callbacks.EMAWeightAveraging], ids=["ours", "lightning"])
def test_two_callbacks_of_one_name_are_refused_by_lightning_and_by_us(other: type[Callback], tmp_path: Path) -> None:
    """`Trainer(...)` compares the keys of their states; we refuse one that is added to the list later."""
    with pytest.raises(RuntimeError, match="EMAWeightAveraging"):
        make_trainer("plain", EMAWeightAveraging(), other(), folder=tmp_path)
    trainer = make_trainer("plain", EMAWeightAveraging(), folder=tmp_path)
    trainer.callbacks.append(other())
    with pytest.raises(MisconfigurationException, match="one callback"):
        fit(trainer, Module())


def test_unsupported_strategies_and_trainers_are_refused(tmp_path: Path) -> None:
    ema = EMAWeightAveraging()
    trainer = make_trainer("plain", ema, folder=tmp_path)
    for strategy in (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy):
        trainer.strategy.__class__ = strategy  # which cannot be constructed without deepspeed or torch_xla
        with pytest.raises(MisconfigurationException, match=strategy.__name__):
            ema.setup(trainer, Module(), "fit")
    other = pytorch_lightning.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(MisconfigurationException, match=r"lightning\.pytorch\.Trainer.*pytorch_lightning"):
        ema.setup(other, Module(), "fit")


@on_ranks(1)
def test_frozen_weights_have_averages_unless_they_are_quantized(tmp_path: Path) -> None:
    module = Module()
    module.net[2].requires_grad_(requires_grad=False)
    module.quantized = torch.nn.Parameter(Quantized(torch.ones(2, 2, dtype=torch.int8)), requires_grad=False)
    ema = EMAWeightAveraging()
    fit(make_trainer("plain", ema, folder=tmp_path), module)
    assert ema.ema is not None
    assert {*ema.ema.state_dict()["tracks"]["default"]["averages"]} == {
        name for name, _ in module.named_parameters() if name != "quantized"
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {"update_every_n_steps": -1},
        {"update_starting_at_step": 0.5},
        {"decay": 1.5},
        {"decay": {"short": 0.9, "long": 0.999}},
        {"dtype": torch.int32},
        {"device": "nowhere"},
        {"device": "cpu", "store": Offloaded()},
    ],
    ids=str,
)
def test_settings_that_are_out_of_range_are_refused_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=next(iter(arguments)).replace("dtype", "int32")):
        EMAWeightAveraging(**arguments)


def test_a_device_of_another_kind_and_an_optimizer_of_other_parameters_are_refused(tmp_path: Path) -> None:
    class Other(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"device: .*cpu.*meta"):
        fit(make_trainer("plain", EMAWeightAveraging("meta"), folder=tmp_path), Module())
    with pytest.raises(MisconfigurationException, match="configure_optimizers"):
        fit(make_trainer("plain", EMAWeightAveraging(), folder=tmp_path), Other())


@pytest.mark.parametrize(
    ("hidden", "expected"), [(["lightning"], "pytorch_lightning"), (["lightning", "pytorch_lightning"], "pip")]
)
def test_without_lightning_the_import_says_what_to_install(hidden: list[str], expected: str) -> None:
    script = (
        f"import importlib.util as u; find = u.find_spec; u.find_spec = lambda name: None if name in {hidden} "
        "else find(name)\nimport ema_dist.lightning"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    last = completed.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError")
    assert 'pip install "lightning>=' in last
    assert expected in last


@on_ranks(1)
def test_the_averages_exist_from_on_fit_start_on(tmp_path: Path) -> None:
    class Looking(Callback):
        def on_fit_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
            assert isinstance(ema.ema, ShardedEMA)
            assert ema.ema.model is trainer.strategy.model

    ema = EMAWeightAveraging()
    assert ema.ema is None
    fit(make_trainer("plain", ema, Looking(), folder=tmp_path), Module())
