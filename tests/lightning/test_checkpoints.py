"""Checkpoints that Lightning writes: exact resumes, averages as the weights, and files of Lightning's callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs lightning: tox -e frameworks")

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from ema_dist import Compensated
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint
from ema_dist.lightning import EMAWeightAveraging
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING
from tests.support.lightning_runs import (
    Module,
    Recorder,
    assert_close,
    assert_same,
    fit,
    full_weights,
    lightning_average,
    lightning_layouts,
    make_module,
    make_trainer,
    on_ranks,
    validate,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


def run(
    layout: str,
    ema: pl.Callback,
    *others: pl.Callback,
    folder: Path,
    resume: Path | None = None,
    **settings: Any,  # noqa: ANN401
) -> tuple[pl.Trainer, list[dict[str, Tensor]]]:
    """A fit, and the results that a resumed one must have: the last live weights, and the model after the fit."""
    recorder, module = Recorder(), make_module(layout)
    trainer = make_trainer(layout, ema, recorder, *others, folder=folder, **settings)
    fit(trainer, module, samples=1, ckpt_path=resume)
    return trainer, [recorder.after_step[-1], full_weights(module)]


def is_not_first(name: str, _: Tensor) -> bool:
    """Leaves one matrix out."""
    return name != "net.0.weight"


def make_savers(folder: Path) -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """One saves the best, after validation; the other, in the middle of an epoch as well, all."""
    return (
        ModelCheckpoint(folder / "best", monitor="val_loss", save_top_k=3),
        ModelCheckpoint(folder / "steps", filename="{step}", every_n_train_steps=3, save_top_k=-1),
    )


@pytest.mark.parametrize(
    ("arguments", "precision"),
    [
        ({"decay": 0.7, "update_every_n_steps": 2, "update_starting_at_epoch": 0}, "32-true"),
        ({"decay": {"default": 0.7, "long": 0.9}, "dtype": torch.bfloat16, "rounding": Compensated()}, "32-true"),
        ({"decay": 0.7, "select": is_not_first}, "bf16-true"),
    ],
    ids=["lightning", "tracks", "bf16"],
)
@lightning_layouts()
def test_a_resumed_run_equals_an_unbroken_one(
    layout: str,
    arguments: dict[str, Any],
    precision: Any,  # noqa: ANN401
    tmp_path: Path,
) -> None:
    """Bit for bit: live weights and averages, resumed inside of an epoch and at its end."""
    best, steps = make_savers(tmp_path)
    settings: dict[str, Any] = {"precision": precision, "max_epochs": 3, "folder": tmp_path}
    ema = EMAWeightAveraging(**arguments)
    trainer, unbroken = run(layout, ema, best, steps, **settings)
    assert ema.ema is not None
    assert best.best_model_score is not None
    for path in (tmp_path / "steps" / "step=6.ckpt", tmp_path / "best" / "epoch=1-step=8.ckpt"):
        resumed = EMAWeightAveraging(**arguments)
        _, results = run(layout, resumed, resume=path, **settings)
        for expected, actual in zip(unbroken, results, strict=True):
            assert_same(actual, expected)
        assert resumed.ema is not None
        assert (resumed.ema.steps, resumed.ema.updates) == (ema.ema.steps, ema.ema.updates)
        assert resumed.state_dict() == ema.state_dict()
        for track in ema.ema.tracks:
            assert_same(resumed.ema.full_state_dict(track=track), ema.ema.full_state_dict(track=track))
    measured = validate(trainer, trainer.lightning_module, ckpt_path=best.best_model_path)
    assert measured == pytest.approx(best.best_model_score.item(), abs=1e-7)


@pytest.mark.parametrize(
    "arguments",
    [
        {"decay": 0.7, "select": is_not_first},
        {"decay": {"default": 0.7, "long": 0.9}},
        {"decay": 0.7, "dtype": torch.bfloat16},
    ],
    ids=["select", "tracks", "bf16"],
)
@lightning_layouts("fsdp1", "fsdp2")
def test_other_programs_read_the_averages_of_a_sharded_checkpoint(
    layout: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Each track, the live weights, the buffers, the counts and the laws, without Lightning."""
    recorder, saver = Recorder(), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    ema, module = EMAWeightAveraging(**arguments), make_module(layout, has_statistics=True)
    fit(make_trainer(layout, ema, recorder, saver, folder=tmp_path), module)
    assert ema.ema is not None
    original = Module(has_statistics=True)
    stored = StoredCheckpoint(tmp_path / "step=8.ckpt")
    (averages,) = stored.averages.values()
    assert (averages.steps, averages.updates) == (ema.ema.steps, ema.ema.updates)
    for track in ema.ema.tracks:
        assert averages.decays[track].decay_per_unit == (0.9 if track == "long" else 0.7)
        assert averages.tracks[track].buffers.keys() == dict(original.named_buffers()).keys()
        full = ema.ema.full_state_dict(track=track)
        selected = stored.weights("ema", track=track)
        assert selected.without_average == (["net.0.weight"] if "select" in arguments else [])
        if dist.get_rank() == 0:
            assert_same_but_statistics(dict(stored.read_weights(selected)), full)
    live = dict(stored.read_weights(stored.weights("live")))
    assert_same_but_statistics(live, recorder.after_step[-1])
    assert [*live] == [*original.state_dict()]


def assert_same_but_statistics(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """DCP saves the statistics of one rank, and each rank has its own."""
    assert left.keys() == right.keys()
    assert_same(*({name: it for name, it in full.items() if "running" not in name} for full in (left, right)))


@lightning_layouts("plain", "ddp")
def test_files_interchange_with_lightnings_own_callback(layout: str, tmp_path: Path) -> None:
    """The averages after the fit are those of a run with Lightning's callback alone."""
    arguments = {"decay": 0.7, "update_every_n_steps": 3}
    types = {"lightning": callbacks.EMAWeightAveraging, "ours": EMAWeightAveraging}
    _, expected = run(layout, types["lightning"](**arguments), folder=tmp_path, max_epochs=4)
    for first, second in (("lightning", "ours"), ("ours", "lightning")):
        saver = ModelCheckpoint(tmp_path / first, filename="{step}")
        run(layout, types[first](**arguments), saver, folder=tmp_path)
        path = tmp_path / first / "step=8.ckpt"
        _, results = run(layout, types[second](**arguments), folder=tmp_path, max_epochs=4, resume=path)
        for actual, wanted in zip(results, expected, strict=True):
            assert_close(actual, wanted)


@on_ranks(1)
@pytest.mark.parametrize("interval", [0, 3])
def test_files_interchange_although_epochs_end_with_an_update(interval: int, tmp_path: Path) -> None:
    """Except that Lightning's callback leaves out the update that our file of the end of an epoch lacks."""
    arguments = {"decay": 0.7, "update_every_n_steps": interval, "update_starting_at_epoch": 1}
    types = {"lightning": callbacks.EMAWeightAveraging, "ours": EMAWeightAveraging}
    _, expected = run("plain", types["lightning"](**arguments), folder=tmp_path, max_epochs=4)
    for first, second in (("lightning", "ours"), ("ours", "lightning")):
        saver = ModelCheckpoint(tmp_path / first, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        at_end = ModelCheckpoint(tmp_path / first / "end", filename="{step}")
        run("plain", types[first](**arguments), saver, at_end, folder=tmp_path)
        for name in ("step=6.ckpt", "end/step=8.ckpt"):  # inside of an epoch, and at its end
            path = tmp_path / first / name
            _, results = run("plain", types[second](**arguments), folder=tmp_path, max_epochs=4, resume=path)
            if (first, name) == ("ours", "end/step=8.ckpt"):
                with pytest.raises(AssertionError):
                    assert_close(results[1], expected[1])
                results.pop()
            for actual, wanted in zip(results, expected, strict=False):
                assert_close(actual, wanted)


@lightning_layouts("plain", "ddp", "fsdp1", "fsdp2")
def test_save_weights_only_saves_the_averages(layout: str, tmp_path: Path) -> None:
    """Lightning calls only the module's own hook then, which the module gets back after the fit."""
    saver = ModelCheckpoint(
        tmp_path / "files", filename="{step}", save_weights_only=True, every_n_train_steps=4, save_top_k=-1
    )
    recorder, module = Recorder(), make_module(layout)
    fit(make_trainer(layout, EMAWeightAveraging(decay=0.7), recorder, saver, folder=tmp_path), module)
    validation = Recorder()
    trainer = make_trainer(layout, validation, folder=tmp_path)
    validate(trainer, make_module(layout), ckpt_path=tmp_path / "files" / "step=4.ckpt")
    assert_close(validation.in_validation[0], lightning_average(recorder.after_step[:4], 0.7))
    assert "on_save_checkpoint" not in vars(module)


@lightning_layouts("ddp", "fsdp2")
def test_a_checkpoint_with_other_averages_is_refused(layout: str, tmp_path: Path) -> None:
    """Other tracks, and averages of other parameters."""
    saved: dict[str, Any] = {"decay": {"default": 0.7, "long": 0.9}, "select": is_not_first}
    run(layout, EMAWeightAveraging(**saved), ModelCheckpoint(tmp_path, filename="{step}"), folder=tmp_path)
    for change, expected in (({"decay": 0.7}, "tracks.*long"), ({"select": None}, "net.0.weight")):
        with pytest.raises(ValueError, match=expected):
            run(layout, EMAWeightAveraging(**saved | change), folder=tmp_path, resume=tmp_path / "step=8.ckpt")


class SavingInValidation(pl.Callback):
    """Saves while the averages are in the model."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_epoch_end(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path)
            trainer.save_checkpoint(f"{self.path}-weights", weights_only=True)


@lightning_layouts("ddp", "fsdp2")
def test_a_checkpoint_saved_during_validation_equals_one_saved_after_it(layout: str, tmp_path: Path) -> None:
    saving, saver = SavingInValidation(tmp_path / "inside"), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    _, unbroken = run(layout, EMAWeightAveraging(decay=0.7), saving, saver, folder=tmp_path)
    for path in (tmp_path / "inside", tmp_path / "step=4.ckpt"):
        _, results = run(layout, EMAWeightAveraging(decay=0.7), folder=tmp_path, resume=path)
        for expected, actual in zip(unbroken, results, strict=True):
            assert_same(actual, expected)
    if layout == "ddp":
        inside, after = (torch.load(tmp_path / name) for name in ("inside-weights", "step=4.ckpt"))
        assert_same(inside["state_dict"], after["state_dict"])
        assert "current_model_state" not in inside


@on_ranks(2)
def test_a_checkpoint_without_live_weights_starts_both_from_its_weights(tmp_path: Path) -> None:
    """One saved after the fit, and one without any callback."""
    trainer, (_, averages) = run("ddp", EMAWeightAveraging(decay=0.7), folder=tmp_path)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    plain, _ = run("ddp", pl.Callback(), folder=tmp_path)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    for name in ("after.ckpt", "plain.ckpt"):
        saved = torch.load(tmp_path / name)
        assert "current_model_state" not in saved
        recorder, ema, module = Recorder(), EMAWeightAveraging(decay=0.7), Module()
        again = make_trainer("ddp", ema, recorder, folder=tmp_path, max_epochs=3)
        fit(again, module, ckpt_path=tmp_path / name)
        if name == "after.ckpt":
            assert_same(saved["state_dict"], averages)
        assert_same(recorder.in_validation[0], saved["state_dict"])
        assert_close(full_weights(module), lightning_average(recorder.after_step, 0.7))
