"""The algorithm in real Trainers: what is averaged, when it is swapped in, and Composer's own EMA as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("composer", reason="needs Composer, which has an environment of its own: tox -e composer")

import composer.algorithms
import torch
from composer import Algorithm, Callback, Event, State, Time
from composer.loggers import Logger
from composer.models import ComposerClassifier, HuggingFaceModel
from composer.utils import dist
from torch import Tensor, nn

from ema_dist import Compensated
from ema_dist.composer import EMA
from tests.support.composer_runs import (
    Classifier,
    Recorder,
    assert_close,
    assert_same,
    checkpoint_path,
    composer_layouts,
    fit,
    full_tensors,
    make_dataloader,
    make_trainer,
    on_ranks,
    reference_average,
)
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


def averages(ema: EMA) -> dict[str, Tensor]:
    """Full averages on the first rank."""
    assert ema.ema is not None
    return {name: tensor for name, tensor in ema.ema.full_state_dict().items() if isinstance(tensor, Tensor)}


def assert_averages(ema: EMA, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """The first rank's full averages are close to these."""
    actual = averages(ema)
    if dist.get_global_rank() == 0:
        assert_close(actual, expected, tolerance)


def without_batch_stats(full: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without BatchNorm statistics: under FSDP, each rank has its own."""
    return {name: tensor for name, tensor in full.items() if "stats" not in name}


@pytest.mark.parametrize(
    "arguments",
    [
        {"half_life": None},
        {"half_life": "10ba", "smoothing": 0.9},
        {"half_life": "10ba", "update_interval": "1ep"},
        {"half_life": "10sp"},
        {"half_life": "10tok", "update_interval": "1tok"},
        {"half_life": "10ba", "update_interval": 3},
        {"half_life": "often"},
        {"half_life": None, "smoothing": 0.9, "update_interval": "1dur"},
        {"ema_start": "soon"},
    ],
    ids=str,
)
def test_what_composer_refuses_is_refused(arguments: dict[str, Any]) -> None:
    for algorithm_type in (composer.algorithms.EMA, EMA):
        with pytest.raises((ValueError, AttributeError)) as raised:
            algorithm_type(**arguments)
        assert algorithm_type is not EMA or raised.type is ValueError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"half_life": "-1ba"}, "half_life.*negative.*'-1ba'"),
        ({"half_life": "10ba", "update_interval": "0ba"}, r"update_interval.*\b1\b.*'0ba'"),
        ({"smoothing": 1.5}, r"smoothing.*\[0, 1\].*1\.5"),
        ({"smoothing": "0.9"}, r"smoothing.*\[0, 1\].*'0\.9'"),
        ({"ema_start": "10sp"}, "unit.*ema_start.*'dur'.*'ba'.*'ep'"),
        ({"half_life": 10}, r"half_life.*'10ba'.*\b10\b"),
        ({"half_life": "10sp"}, "unit.*half_life.*'ba'.*'ep'"),
        ({"rounding": Compensated()}, r"rounding=Compensated\(\).*dtype=torch\.bfloat16.*dtype=None"),
        ({"dtype": torch.int64}, r"floating-point.*\b16\b.*dtype=torch\.int64"),
    ],
    ids=str,
)
def test_what_composer_does_not_notice_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMA(**arguments)


def test_the_factor_of_the_old_average() -> None:
    assert EMA().smoothing == composer.algorithms.EMA().smoothing == 2 ** (-1 / 1000)
    assert EMA(half_life="10ba", update_interval="5ba").smoothing == 2**-0.5
    assert EMA("2ep").update_interval == Time.from_timestring("1ep")
    assert EMA(half_life="0ba").smoothing == 0
    assert EMA(smoothing=0.9).smoothing == EMA(half_life=None, smoothing=0.9).smoothing == 0.9
    assert EMA(smoothing=0.9).update_interval == Time.from_timestring("1ba")
    assert str(EMA(half_life="5ba", ema_start="0.1dur")) == (
        "EMA(half_life=5ba, smoothing=None, ema_start=0.1dur, update_interval=1ba, train_with_ema_weights=False)"
    )


SETTINGS = [
    {"half_life": "3ba"},
    {"half_life": "1ep"},
    {"half_life": None, "smoothing": 0.8, "update_interval": "2ba"},
    {"half_life": "3ba", "ema_start": "4ba"},
    {"half_life": "3ba", "ema_start": "0.5dur", "update_interval": "3ba"},
    {"half_life": "3ba", "ema_start": "1ep"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@composer_layouts("plain", "ddp")
def test_averages_equal_those_of_composers_own(layout: str, settings: dict[str, Any]) -> None:
    ours, theirs = EMA(**settings), composer.algorithms.EMA(**settings)
    for algorithm in (ours, theirs):
        fit(make_trainer(layout, algorithm, max_duration="3ep", train_dataloader=make_dataloader(count=8)))
    their_names = {**theirs.ema_model.named_parameters_dict, **theirs.ema_model.named_buffers_dict}
    expected = {name.removeprefix("module."): tensor for name, tensor in their_names.items()}
    assert "net.stats.running_mean" in expected
    actual = averages(ours)
    if dist.get_global_rank() == 0:
        assert_close(
            actual, {n: tensor for n, tensor in expected.items() if tensor.is_floating_point() and "scratch" not in n}
        )
        assert actual["net.stats.num_batches_tracked"] == (12 if layout == "ddp" else 24)


@composer_layouts("ddp", "fsdp1", "fsdp2", "hsdp")
def test_averages_equal_the_float64_reference(layout: str) -> None:
    recorder, ema = Recorder(), EMA(half_life="3ba")
    fit(make_trainer(layout, ema, callbacks=[recorder]))
    assert len(recorder.weights_after_batch) == 8
    assert_averages(ema, reference_average(recorder.weights_after_batch, ema.smoothing))


@composer_layouts("ddp", "fsdp1", "fsdp2", "hsdp")
def test_evaluation_sees_the_averages_and_training_the_live_weights(layout: str, tmp_path: Path) -> None:
    recorder, ema = Recorder(), EMA(half_life="3ba")
    trainer = make_trainer(
        layout, ema, callbacks=[recorder], eval_interval="2ba", save_folder=str(tmp_path), save_interval="3ba"
    )
    trainer.eval()
    fit(trainer, "5ba")
    trainer.eval()
    before_prediction = full_tensors(trainer.state)
    trainer.predict(make_dataloader(count=2))
    assert_same(full_tensors(trainer.state), before_prediction)
    fit(trainer, "3ba")
    trainer.eval()
    assert not ema.ema_weights_active
    num_batches = 0
    for event, weights in recorder.model_at_event:
        live = recorder.weights_after_batch[num_batches - 1] if num_batches else weights
        if event == "batch_start":
            assert_same(without_batch_stats(weights), without_batch_stats(live))
            num_batches += 1
        elif num_batches:
            assert_close(
                without_batch_stats(weights),
                without_batch_stats(reference_average(recorder.weights_after_batch[:num_batches], ema.smoothing)),
            )
    assert num_batches == 8
    assert {event for event, _ in recorder.model_at_event} == {"batch_start", "eval_batch_start", "predict_batch_start"}
    assert_same(without_batch_stats(full_tensors(trainer.state)), without_batch_stats(recorder.weights_after_batch[-1]))


class RaiseDuringEvaluation(Callback):
    """Raises an exception during an evaluation, once."""

    pending = True

    def eval_batch_end(self, state: State, _: Logger) -> None:
        if self.pending and state.timestamp.batch == 2:
            self.pending = False
            raise KeyError("interrupted")


@composer_layouts("ddp", "fsdp1", "fsdp2")
def test_live_weights_come_back_after_an_exception_inside_evaluation(layout: str) -> None:
    recorder, ema = Recorder(), EMA(half_life="3ba")
    trainer = make_trainer(layout, ema, callbacks=[recorder, RaiseDuringEvaluation()], eval_interval="2ba")
    with pytest.raises(KeyError, match="interrupted"):
        fit(trainer)
    assert ema.ema_weights_active
    fit(trainer, "4ba")
    assert not ema.ema_weights_active
    starts = [weights for event, weights in recorder.model_at_event if event == "batch_start"]
    assert_same(without_batch_stats(starts[2]), without_batch_stats(recorder.weights_after_batch[1]))
    assert_averages(ema, without_batch_stats(reference_average(recorder.weights_after_batch, ema.smoothing)))


class InfiniteLoss(Callback):
    """Makes the loss, and so the gradients, of some batches infinite."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches

    def after_loss(self, state: State, _: Logger) -> None:
        if state.timestamp.batch in self.batches:
            state.loss = state.loss * float("inf")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("settings", "skipped_batches", "start_batch", "averaged_batches"),
    [
        ({}, (2, 5), 0, (0, 1, 3, 4, 6, 7)),
        ({"update_interval": "2ba"}, (2, 3, 5), 0, (1, 5, 7)),
        ({"ema_start": "4ba"}, (0, 3), 3, (4, 5, 6, 7)),
    ],
    ids=str,
)
@composer_layouts("plain")
def test_a_batch_whose_step_the_scaler_skipped_is_no_update(
    layout: str,
    settings: dict[str, Any],
    skipped_batches: tuple[int, ...],
    start_batch: int,
    averaged_batches: tuple[int, ...],
    fused: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder, ema, model = Recorder(), EMA(half_life="3ba", **settings), Classifier()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2, fused=fused
    )
    trainer = make_trainer(
        layout, ema, model=model, optimizers=optimizer, callbacks=[recorder, InfiniteLoss(*skipped_batches)]
    )
    trainer.state.scaler = torch.amp.GradScaler("cpu")
    monkeypatch.setattr(trainer, "_use_grad_scaling", lambda *_: True)
    monkeypatch.setattr(trainer, "_use_closures", lambda: False)
    fit(trainer)
    averaged_weights = [recorder.weights_after_batch[batch] for batch in (start_batch, *averaged_batches)]
    assert ema.ema is not None
    assert ema.ema.updates == len(averaged_batches)
    assert_averages(ema, without_batch_stats(reference_average(averaged_weights, ema.smoothing)))


@pytest.mark.parametrize("saves_weights_only", [False, True])
@composer_layouts("plain", "ddp")
def test_a_save_after_an_exception_inside_evaluation_has_the_live_weights(
    layout: str,
    saves_weights_only: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    recorder, ema = Recorder(), EMA(half_life="3ba")
    trainer = make_trainer(layout, ema, callbacks=[recorder, RaiseDuringEvaluation()], eval_interval="2ba")
    with pytest.raises(KeyError, match="interrupted"):
        fit(trainer)
    trainer.save_checkpoint(str(tmp_path / "saved.pt"), weights_only=saves_weights_only)
    assert not ema.ema_weights_active
    dist.barrier()
    state = torch.load(tmp_path / "saved.pt", weights_only=False)["state"]["model"]
    assert_same(without_batch_stats(state), without_batch_stats(recorder.weights_after_batch[-1]))
    fit(trainer, "4ba")
    assert_averages(ema, without_batch_stats(reference_average(recorder.weights_after_batch, ema.smoothing)))


@composer_layouts("ddp", "fsdp2")
def test_a_save_in_the_middle_of_an_evaluation_has_the_live_weights(layout: str, tmp_path: Path) -> None:
    class SaveDuringEvaluation(Callback):
        def eval_batch_end(self, state: State, _: Logger) -> None:
            if state.timestamp.batch == 4 and state.eval_timestamp.batch == 1:
                trainer.save_checkpoint(str(tmp_path / "ep{epoch}-ba{batch}-rank{rank}"))

    recorder, ema = Recorder(), EMA(half_life="3ba")
    trainer = make_trainer(
        layout,
        ema,
        callbacks=[recorder, SaveDuringEvaluation()],
        eval_interval="4ba",
        eval_dataloader=make_dataloader(count=8),
    )
    fit(trainer)
    average = without_batch_stats(reference_average(recorder.weights_after_batch[:4], ema.smoothing))
    evaluated = [weights for event, weights in recorder.model_at_event if event == "eval_batch_start"]
    assert len(evaluated) == 8
    for weights in evaluated[:4]:
        assert_close(without_batch_stats(weights), average)
    resumed, resumed_ema = Recorder(), EMA(half_life="3ba")
    fit(
        make_trainer(
            layout, resumed_ema, model=Classifier(1), callbacks=[resumed], load_path=checkpoint_path(tmp_path, 4)
        )
    )
    for weights, expected in zip(resumed.weights_after_batch, recorder.weights_after_batch[4:], strict=True):
        assert_same(without_batch_stats(weights), without_batch_stats(expected))


@composer_layouts("plain")
def test_gradient_accumulation_counts_once_a_batch(layout: str) -> None:
    ema = EMA(half_life="3ba")
    fit(make_trainer(layout, ema, device_train_microbatch_size=2))
    assert ema.ema is not None
    assert ema.ema.updates == 8


class RecordAtBatchEnd(Algorithm):
    """Records full weights at the end of each batch; ahead of the averages if it is listed before EMA."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def match(self, event: Event, _: State) -> bool:
        return event == Event.BATCH_END

    def apply(self, _: Event, state: State, __: Logger) -> None:
        self.weights.append(full_tensors(state))


@composer_layouts("plain", "ddp", "fsdp1", "fsdp2", "hsdp")
def test_training_may_go_on_from_the_averages(layout: str) -> None:
    recorder, stepped, ema = Recorder(), RecordAtBatchEnd(), EMA(half_life="3ba", train_with_ema_weights=True)
    fit(make_trainer(layout, stepped, ema, callbacks=[recorder]))
    assert len(stepped.weights) == 8
    for batch, live in enumerate(recorder.weights_after_batch):
        assert_close(
            without_batch_stats(live),
            without_batch_stats(reference_average(stepped.weights[: batch + 1], ema.smoothing)),
        )
    assert_averages(ema, without_batch_stats(recorder.weights_after_batch[-1]))


@composer_layouts("ddp", "fsdp1", "fsdp2")
def test_models_are_given_the_averages_and_the_live_weights(layout: str) -> None:
    class GetModelsDuringEvaluation(Callback):
        live: dict[str, Tensor]

        def eval_start(self, state: State, _: Logger) -> None:
            with pytest.raises(ValueError, match=r"ema weight.*composer model"):
                ema.get_ema_model(other)
            self.live = dict(ema.get_training_model(other).state_dict())
            assert ema.ema_weights_active
            self.weights = full_tensors(state)

    ema, other, callback, recorder = EMA(half_life="3ba"), Classifier(seed=5), GetModelsDuringEvaluation(), Recorder()
    trainer = make_trainer(layout, ema, callbacks=[callback, recorder])
    with pytest.raises(ValueError, match=r"ema_start.*0\.0dur"):
        ema.get_ema_model(other)
    fit(trainer)
    assert ema.get_ema_model(other) is other
    assert_averages(ema, dict(other.state_dict()), tolerance=0)
    with pytest.raises(ValueError, match=r"training weights.*composer model"):
        ema.get_training_model(other)
    trainer.eval()
    assert_same(without_batch_stats(callback.live), without_batch_stats(recorder.weights_after_batch[-1]))
    assert_close(
        without_batch_stats(callback.weights),
        without_batch_stats(reference_average(recorder.weights_after_batch, ema.smoothing)),
    )


def test_two_emas_are_refused() -> None:
    for other in (EMA(), composer.algorithms.EMA()):
        with pytest.raises(ValueError, match=r"\bEMA\b.*algorithms.*\b2\b"):
            make_trainer("plain", EMA(), other)


def test_an_ema_outside_a_trainer_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"\bEMA\b.*Trainer\(algorithms="):
        EMA().get_ema_model(nn.Linear(1, 1))


def make_huggingface_model(seed: int) -> HuggingFaceModel:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=12, num_labels=3)
    return HuggingFaceModel(transformers.BertForSequenceClassification(config), use_logits=True)


@composer_layouts("ddp", "fsdp1", "fsdp2")
def test_huggingface_models_are_averaged_and_resumed(layout: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "input_ids": torch.randint(0, 11, (5,), generator=generator),
            "attention_mask": torch.ones(5, dtype=torch.long),
            "labels": 1,
        }
        for _ in range(32)
    ]

    def train(seed: int, **settings: Any) -> tuple[Recorder, EMA]:  # noqa: ANN401
        recorder, ema = Recorder(), EMA(half_life="3ba")
        sampler = dist.get_sampler(samples, shuffle=False)
        loader = torch.utils.data.DataLoader(samples, batch_size=2, sampler=sampler)
        arguments = {"train_dataloader": loader, "eval_dataloader": loader, "eval_interval": "3ba", **settings}
        fit(make_trainer(layout, ema, model=make_huggingface_model(seed), callbacks=[recorder], **arguments))
        return recorder, ema

    uninterrupted, ema = train(0, save_folder=str(tmp_path), save_interval="4ba")
    assert_averages(ema, reference_average(uninterrupted.weights_after_batch, ema.smoothing))
    resumed, resumed_ema = train(1, load_path=checkpoint_path(tmp_path, 4))
    for weights, expected in zip(resumed.weights_after_batch, uninterrupted.weights_after_batch[4:], strict=True):
        assert_same(weights, expected)
    assert_same(averages(resumed_ema), averages(ema))


class BFloat16Classifier(ComposerClassifier):
    """A classifier with bfloat16 weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5)).bfloat16(), num_classes=5)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.module(batch[0].bfloat16()).float()


@composer_layouts("plain", "fsdp2")
def test_half_precision_weights_have_float32_averages(layout: str) -> None:
    recorder, ema = Recorder(), EMA(half_life="50ba", replicas="copy")
    fit(make_trainer(layout, ema, model=BFloat16Classifier(), callbacks=[recorder]))
    assert ema.ema is not None
    actual = ema.ema.full_state_dict(dtype=torch.float32)
    if dist.get_global_rank() == 0:
        assert_close(actual, reference_average(recorder.weights_after_batch, ema.smoothing))


@on_ranks(2)
def test_replicas_cannot_share_averages_in_sharded_checkpoints() -> None:
    with pytest.raises(ValueError, match=r'replicas=.shard..*replicas="copy"'):
        fit(make_trainer("fsdp2", EMA(replicas="shard")))


def test_events_that_change_nothing_are_not_matched() -> None:
    ema = EMA()
    trainer = make_trainer("plain", ema)
    for event in (Event.BATCH_START, Event.EVAL_END, Event.BATCH_CHECKPOINT, Event.EPOCH_END):
        assert not ema.match(event, trainer.state)
    assert ema.match(Event.BATCH_END, trainer.state)
