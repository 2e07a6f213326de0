"""The Trainer of transformers with averages: evaluation, checkpoints, resuming, and the exported model."""

from __future__ import annotations

import math
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers: tox -e frameworks")

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from ema_dist import HalfLife
from ema_dist.transformers import EMACallback
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING
from tests.support.transformers_runs import (
    Recorder,
    assert_close,
    assert_same,
    full_tensors,
    ignored_warnings,
    is_first_rank,
    make_model,
    make_samples,
    make_trainer,
    reference_average,
    start_accelerate,
    trainer_layouts,
)

DECAY = 0.8
EVERY_FOUR_STEPS: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "gradient_accumulation_steps": 2,
}

pytestmark = [IGNORE_INITIAL_WEIGHTS_WARNING]


def loss_of(model: torch.nn.Module, seed: int) -> float:
    """The mean loss of an unwrapped model on the samples of this seed."""
    samples = make_samples(8, seed=seed)
    with torch.no_grad():
        return model.eval()(**{name: torch.stack([row[name] for row in samples]) for name in samples[0]}).loss.item()


def model_with(weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """An unwrapped model with these weights."""
    model = make_model()
    model.load_state_dict(weights)
    return model


def averages_of(callback: EMACallback) -> dict[str, Tensor]:
    """The full averages on the first rank, elsewhere an empty dictionary."""
    assert callback.ema is not None
    return callback.ema.full_state_dict()


def assert_averages(callback: EMACallback, reference: dict[str, Tensor]) -> None:
    """The full averages equal the float64 reference. Collective."""
    averages = averages_of(callback)
    if is_first_rank():
        assert_close(averages, reference)


@trainer_layouts()
def test_evaluations_use_averages_and_a_resumed_run_is_bit_identical(layout: str, tmp_path: Path) -> None:
    """Evaluations equal those of the float64 reference, and the resumed run is bit-identical."""
    recorder = Recorder()
    data = {"eval_dataset": {"a": make_samples(8, seed=8), "b": make_samples(8, seed=9)}}
    trainer = make_trainer(
        layout, tmp_path, recorder, trainer_settings=data, eval_on_start=True, save_total_limit=2, **EVERY_FOUR_STEPS
    )
    initial = full_tensors(trainer.model)
    callback = EMACallback(decay=DECAY).bind(trainer)
    trainer.train()
    assert callback.ema is not None
    assert callback.ema.steps == 8
    assert all(isinstance(weight, DTensor) == layout.startswith("fsdp2") for weight in trainer.model.parameters())
    references = [reference_average([initial, *recorder.weights[:count]], DECAY) for count in (0, 4, 8)]
    assert_averages(callback, references[-1])
    averages = averages_of(callback)
    recorded = [row[key] for row in recorder.metrics for key in ("eval_a_loss", "eval_b_loss") if key in row]
    expected = [loss_of(model_with(reference), seed) for reference in references for seed in (8, 9)]
    assert recorded == pytest.approx(expected, rel=1e-5)
    predicted = trainer.predict(make_samples(8, seed=9)).metrics
    assert predicted is not None
    assert predicted["test_loss"] == recorded[-1]
    with callback.live_weights():
        live_loss = trainer.evaluate(make_samples(8, seed=8))["eval_loss"]
    assert live_loss == pytest.approx(loss_of(model_with(recorder.weights[-1]), 8), rel=1e-5)

    resume: str | bool = str(tmp_path / "checkpoint-4")
    if layout == "fsdp2":
        if is_first_rank():
            shutil.rmtree(tmp_path / "checkpoint-8")
        dist.barrier()
        resume = True
    resumed_recorder = Recorder()
    resumed = make_trainer(layout, tmp_path, resumed_recorder, model=make_model(seed=1), **EVERY_FOUR_STEPS)
    resumed_callback = EMACallback(decay=DECAY).bind(resumed)
    with ignored_warnings():
        resumed.train(resume_from_checkpoint=resume)
    for weights, same in zip(resumed_recorder.weights, recorder.weights[4:], strict=True):
        assert_same(weights, same)
    assert_same(averages_of(resumed_callback), averages)

    callback.save_pretrained(tmp_path / "averaged")
    trainer.save_model(str(tmp_path / "saved"))
    for folder in ("averaged", "saved"):
        if is_first_rank():
            assert_same(LlamaForCausalLM.from_pretrained(tmp_path / folder).state_dict(), averages)
    assert_same(full_tensors(trainer.model), recorder.weights[-1])


class ScriptedScores:
    """`compute_metrics` that returns one score after the other."""

    def __init__(self, *scores: float) -> None:
        self.scores = iter(scores)

    def __call__(self, _: object) -> dict[str, float]:
        return {"score": next(self.scores)}


@trainer_layouts("plain", "ddp", "fsdp2", "fsdp2-sharded")
def test_the_best_checkpoint_is_loaded_at_the_end(layout: str, tmp_path: Path) -> None:
    """Live weights and averages are those of step 8, of 12, and its checkpoint is the only one that is kept."""
    recorder = Recorder()
    settings = EVERY_FOUR_STEPS | {"max_steps": 12, "save_total_limit": 1, "load_best_model_at_end": True}
    trainer = make_trainer(
        layout,
        tmp_path,
        recorder,
        trainer_settings={"compute_metrics": ScriptedScores(1, 3, 2)},
        metric_for_best_model="score",
        greater_is_better=True,
        **settings,
    )
    initial = full_tensors(trainer.model)
    callback = EMACallback(decay=DECAY).bind(trainer)
    with ignored_warnings():
        trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8"}
    assert_same(full_tensors(trainer.model), recorder.weights[7])
    assert callback.ema is not None
    assert callback.ema.steps == 8
    reference = reference_average([initial, *recorder.weights[:8]], DECAY)
    assert_averages(callback, reference)
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(model_with(reference), 8), rel=1e-5)


class FailingMetrics:
    """`compute_metrics` that raises."""

    def __call__(self, _: object) -> dict[str, float]:
        raise ArithmeticError("no score")


@trainer_layouts("ddp", "fsdp2")
def test_live_weights_are_back_after_an_evaluation_that_raises(layout: str, tmp_path: Path) -> None:
    """And the same trainer trains again, with new averages."""
    recorder = Recorder()
    settings: dict[str, Any] = {"trainer_settings": {"compute_metrics": FailingMetrics()}, **EVERY_FOUR_STEPS}
    trainer = make_trainer(layout, tmp_path, recorder, **settings)
    callback = EMACallback(decay=DECAY).bind(trainer)
    with pytest.raises(Exception, match="no score"):
        trainer.train()
    assert_same(full_tensors(trainer.model), recorder.weights[-1])
    trainer.compute_metrics = None
    start = full_tensors(trainer.model)
    trainer.train()
    assert callback.ema is not None
    assert callback.ema.steps == 8
    assert_averages(callback, reference_average([start, *recorder.weights[4:]], DECAY))


@trainer_layouts("ddp")
def test_a_checkpoint_without_averages_starts_them_from_its_weights(layout: str, tmp_path: Path) -> None:
    make_trainer(layout, tmp_path, **EVERY_FOUR_STEPS).train()
    recorder = Recorder()
    trainer = make_trainer(layout, tmp_path, recorder, model=make_model(seed=1), **EVERY_FOUR_STEPS | {"max_steps": 10})
    callback = EMACallback(decay=DECAY).bind(trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=True)
    messages = [str(warning.message) for warning in caught if "no averages" in str(warning.message)]
    assert [str(tmp_path / "checkpoint-8") in message for message in messages] == ([True] if is_first_rank() else [])
    assert callback.ema is not None
    assert callback.ema.steps == 2
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-8").state_dict()
    assert_averages(callback, reference_average([saved, *recorder.weights], DECAY))


@trainer_layouts("ddp")
def test_with_copied_averages_the_main_process_saves_and_swaps_alone(layout: str, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(layout, tmp_path, recorder)
    callback = EMACallback(decay=DECAY, replicas="copy", timeout=2).bind(trainer)
    trainer.train()
    if is_first_rank():
        callback.save_pretrained(tmp_path / "averaged")
        trainer.save_model(str(tmp_path / "saved"))
        for folder in ("averaged", "saved"):
            assert_same(LlamaForCausalLM.from_pretrained(tmp_path / folder).state_dict(), averages_of(callback))
        assert callback.ema is not None
        with callback.ema.swapped():
            assert_same({**trainer.accelerator.unwrap_model(trainer.model).state_dict()}, averages_of(callback))
    assert_same(full_tensors(trainer.model), recorder.weights[-1])


@pytest.mark.world_size(2, timeout=60)
def test_a_model_that_transformers_shards_when_it_loads_it(tmp_path: Path) -> None:
    """Tensor parallelism without accelerate's wrappers; the Trainer cannot resume such a run."""
    if is_first_rank():
        make_model().save_pretrained(tmp_path / "base")
    dist.barrier()
    start_accelerate("ddp")
    with ignored_warnings():
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base", tp_plan="auto")
    trainer = make_trainer("fsdp2-at-load-time", tmp_path, model=model, save_only_model=True, **EVERY_FOUR_STEPS)
    callback = EMACallback(decay=DECAY).bind(trainer)
    with ignored_warnings():
        trainer.train()
        callback.save_pretrained(tmp_path / "averaged")
        trainer.save_model(str(tmp_path / "saved"))
    averages = averages_of(callback)
    for folder in ("averaged", "saved"):
        if is_first_rank():
            assert_same(LlamaForCausalLM.from_pretrained(tmp_path / folder).state_dict(), averages)


class WeightsSeen(Seq2SeqTrainer):
    """A subclass with a prediction step of its own, which records the weights that it sees."""

    seen: dict[str, Tensor]

    def prediction_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self.seen = full_tensors(model)
        return Trainer.prediction_step(self, model, *args, **kwargs)


@trainer_layouts("plain")
def test_subclasses_of_the_trainer(layout: str, tmp_path: Path) -> None:
    """With `save_only_model`, a checkpoint has the live model and the averages."""
    recorder = Recorder()
    trainer = make_trainer(
        layout,
        tmp_path,
        recorder,
        trainer_class=WeightsSeen,
        arguments_class=Seq2SeqTrainingArguments,
        save_only_model=True,
        **EVERY_FOUR_STEPS,
    )
    callback = EMACallback(decay={"short": 0.5, "default": DECAY}, start=2).bind(trainer)
    trainer.train()
    assert isinstance(trainer, WeightsSeen)
    assert_same(trainer.seen, averages_of(callback))
    assert_same(trainer.seen | recorder.weights[-1], full_tensors(trainer.model))
    trainer.predict(make_samples(4))
    assert_same(trainer.seen, averages_of(callback))
    checkpoint = tmp_path / "checkpoint-8"
    assert not (checkpoint / "optimizer.pt").exists()
    assert_same(LlamaForCausalLM.from_pretrained(checkpoint).state_dict(), recorder.weights[-1])
    assert [path.name for path in (checkpoint / "ema").iterdir()] == ["step-0000000008"]


class FakeHub:
    """The two calls of the hub's API that the Trainer makes; keeps the weights of each upload."""

    def __init__(self) -> None:
        self.uploads: list[tuple[str, dict[str, Tensor]]] = []
        self.push_in_progress = Future[str]()

    def create_repo(self, name: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, folder_path: str, commit_message: str, **_: object) -> Future[str]:
        self.uploads.append((commit_message, full_tensors(LlamaForCausalLM.from_pretrained(folder_path))))
        self.push_in_progress = Future()
        self.push_in_progress.set_result(commit_message)
        return self.push_in_progress


@trainer_layouts("plain")
def test_uploads_during_training_are_of_live_weights_and_later_ones_of_averages(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    recorder = Recorder()
    trainer = make_trainer(layout, tmp_path, recorder, push_to_hub=True, hub_always_push=True, **EVERY_FOUR_STEPS)
    callback = EMACallback(decay=DECAY).bind(trainer)
    trainer.train()
    trainer.push_to_hub()
    trainer.save_model(str(tmp_path / "saved"))
    averages = averages_of(callback)
    expected = [recorder.weights[3], recorder.weights[7], averages, averages]
    for (message, uploaded), weights in zip(hub.uploads, expected, strict=True):
        assert message.startswith("Training in progress") == (weights is not averages)
        assert_same(uploaded, weights)


TRAINERS: list[Trainer] = []


class BindsLate(Recorder):
    """Binds an `EMACallback` in the middle of training."""

    def on_step_end(self, *_: object, **__: object) -> None:
        EMACallback().bind(TRAINERS[-1])


class AddsLate(Recorder):
    """Adds an `EMACallback` in the middle of training, without binding it."""

    def on_step_end(self, *_: object, **__: object) -> None:
        TRAINERS[-1].add_callback(EMACallback())


@trainer_layouts("plain")
def test_wrong_use_is_refused(layout: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="decy"):
        EMACallback(decy=0.9)
    with pytest.raises(ValueError, match=r"'default'.*'short', 'long'"):
        EMACallback(decay={"short": 0.5, "long": 0.9})
    trainer = make_trainer(layout, tmp_path, EMACallback(decay=DECAY))
    with pytest.raises(RuntimeError, match=r"not bound.*bind\(trainer\)"):
        trainer.train()

    trainer = make_trainer(layout, tmp_path)
    callback = EMACallback(decay=DECAY)
    assert callback.bind(trainer) is callback
    with pytest.raises(RuntimeError, match="bound to a Trainer already"):
        callback.bind(trainer)
    with pytest.raises(ValueError, match="another EMACallback"):
        EMACallback(decay=DECAY).bind(trainer)
    with pytest.raises(RuntimeError, match=r"before train\(\)"):
        callback.save_pretrained(tmp_path / "averaged")

    for late, message in ((BindsLate(), r"bind before\s+train"), (AddsLate(), "not bound")):
        TRAINERS.append(make_trainer(layout, tmp_path, late))
        with pytest.raises(RuntimeError, match=message):
            TRAINERS[-1].train()

    casting: list[dict[str, Any]] = [{"bf16_full_eval": True}, {"fp16_full_eval": True}]
    for settings in casting:
        with pytest.raises(ValueError, match="full_eval"):
            EMACallback().bind(make_trainer(layout, tmp_path, **settings))
    trainer = make_trainer(layout, tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"DeepSpeed.*FSDP2"):
        EMACallback().bind(trainer)

    trainer = make_trainer(layout, tmp_path, model=NotPretrained())
    callback = EMACallback(decay=DECAY).bind(trainer)
    trainer.train()
    with pytest.raises(ValueError, match=r"checkpoint\.gather"):
        callback.save_pretrained(tmp_path / "averaged")


@trainer_layouts("plain")
def test_other_averages_and_no_averages_can_be_evaluated(layout: str, tmp_path: Path) -> None:
    callback = EMACallback(decay={"default": HalfLife(math.inf), "long": HalfLife(0)})  # initial and live weights
    trainer = make_trainer(layout, tmp_path)
    initial = trainer.evaluate()["eval_loss"]
    callback.bind(trainer)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == initial
    with callback.live_weights():
        live = trainer.evaluate()["eval_loss"]
    assert callback.ema is not None
    with callback.ema.swapped("long"):
        assert trainer.evaluate()["eval_loss"] == live != initial
    trainer.remove_callback(callback)
    trainer.train()
    assert callback.ema is None
    with callback.live_weights():
        live = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == live


class NotPretrained(torch.nn.Module):
    """A model that is no `PreTrainedModel`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # noqa: ANN401  a ModelOutput
        return self.model(input_ids=input_ids, labels=labels)
