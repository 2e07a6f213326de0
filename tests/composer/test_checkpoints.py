"""Composer's checkpoints: whatever saved them, training goes on from the live weights and the exact averages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("composer", reason="needs Composer, which has an environment of its own: tox -e composer")

import composer.algorithms
import torch
import torch.distributed as dist
from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.models import ComposerClassifier
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner

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
from tests.support.reshard_cases import run_in_world

HALF_LIFE = "3ba"

pytestmark = [
    IGNORE_INITIAL_WEIGHTS_WARNING,
    pytest.mark.filterwarnings(
        "ignore:Please use DTensor:FutureWarning"
    ),  # from torch's own code, in FSDP1's checkpoints
    pytest.mark.filterwarnings("ignore:When using ``NO_SHARD``:UserWarning"),  # FSDP1 on one rank
]


def without_batch_stats(full: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without BatchNorm statistics: each rank has its own, and Composer saves those of one rank."""
    return {name: tensor for name, tensor in full.items() if "stats" not in name}


def assert_resumed(resumed: Recorder, uninterrupted: Recorder, *, after: int) -> None:
    """The resumed run has bit-identical weights after each batch."""
    for weights, expected in zip(resumed.weights_after_batch, uninterrupted.weights_after_batch[after:], strict=True):
        assert_same(without_batch_stats(weights), without_batch_stats(expected))


def averages(ema: EMA) -> dict[str, Tensor]:
    """Full averages in their own dtype, without BatchNorm statistics, on the first rank."""
    assert ema.ema is not None
    return without_batch_stats({name: tensor for name, tensor in ema.ema.gather() if isinstance(tensor, Tensor)})


def assert_averages(ema: EMA, expected: dict[str, Tensor]) -> None:
    """The first rank's full averages are bit-identical to these."""
    assert_same(averages(ema), expected if dist.get_rank() == 0 else {})


def make_saving_trainer(layout: str, folder: Path, **settings: Any) -> tuple[Trainer, EMA, Recorder]:  # noqa: ANN401
    """A trainer that saves after every fourth of its eight batches, by CheckpointSaver."""
    recorder, ema = Recorder(), EMA(half_life=HALF_LIFE)
    given = {"save_folder": str(folder), "save_interval": "4ba", "callbacks": [recorder], **settings}
    return make_trainer(layout, ema, **given), ema, recorder


def make_resumed_trainer(layout: str, path: str, **settings: Any) -> tuple[Trainer, EMA, Recorder]:  # noqa: ANN401
    """A trainer that has loaded a checkpoint, over other initial weights."""
    recorder, ema = Recorder(), EMA(half_life=HALF_LIFE)
    given = {"model": Classifier(seed=1), "callbacks": [recorder], "load_path": path, **settings}
    return make_trainer(layout, ema, **given), ema, recorder


@composer_layouts()
def test_a_resumed_run_is_bit_identical(layout: str, tmp_path: Path) -> None:
    trainer, ema, uninterrupted = make_saving_trainer(layout, tmp_path)
    fit(trainer)
    resumed_trainer, resumed_ema, resumed = make_resumed_trainer(layout, checkpoint_path(tmp_path, 4))
    fit(resumed_trainer)
    assert resumed_trainer.state.timestamp.batch == 8
    for weights, expected in zip(resumed.weights_after_batch, uninterrupted.weights_after_batch[4:], strict=True):
        assert_same(without_batch_stats(weights), without_batch_stats(expected))
        if dist.get_rank() == 0:  # Composer saves this rank's BatchNorm statistics
            assert_same(weights, expected)
    assert resumed_ema.ema is not None
    assert ema.ema is not None
    assert (resumed_ema.ema.updates, ema.ema.updates) == (8, 8)
    assert_same(
        *({n: tensor for n, tensor in each.ema.gather() if isinstance(tensor, Tensor)} for each in (resumed_ema, ema))
    )


@composer_layouts()
def test_a_run_resumed_from_an_explicit_save_is_bit_identical(layout: str, tmp_path: Path) -> None:
    trainer, ema, uninterrupted = make_saving_trainer(layout, tmp_path / "saver", max_duration="8ba")
    fit(trainer, "4ba")
    trainer.eval()
    trainer.save_checkpoint(str(tmp_path / "explicit" / "ep{epoch}-ba{batch}-rank{rank}"))
    fit(trainer, "4ba")
    resumed_trainer, resumed_ema, resumed = make_resumed_trainer(layout, checkpoint_path(tmp_path / "explicit", 4))
    fit(resumed_trainer)
    assert_resumed(resumed, uninterrupted, after=4)
    assert_same(averages(resumed_ema), averages(ema))


@composer_layouts("ddp")
def test_live_and_average_weights_in_a_monolithic_checkpoint(layout: str, tmp_path: Path) -> None:
    trainer, _, recorder = make_saving_trainer(layout, tmp_path / "saver")
    fit(trainer, "4ba")
    trainer.save_checkpoint(str(tmp_path / "explicit.pt"))
    live, average = recorder.weights_after_batch[-1], reference_average(recorder.weights_after_batch, 2 ** (-1 / 3))
    for path, model, other, is_active in (
        (checkpoint_path(tmp_path / "saver", 4), average, live, True),
        (tmp_path / "explicit.pt", live, average, False),
    ):
        state = torch.load(path, weights_only=False)["state"]
        algorithm_state = dict(state["algorithms"])["EMA"]
        assert algorithm_state["ema_weights_active"] is is_active
        assert_close(state["model"], without_batch_stats(model))
        stored = {
            **algorithm_state["ema_model"]["named_parameters_dict"],
            **algorithm_state["ema_model"]["named_buffers_dict"],
        }
        named = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
        assert_close(other, {name: tensor for name, tensor in without_batch_stats(named).items() if name in other})


RESHARD_CASES = [
    ("fsdp2", 2, 1),
    ("fsdp2", 2, 4),
    ("fsdp2", 4, 2),
    ("fsdp1", 2, 1),
    ("fsdp1", 2, 4),
    ("ddp", 2, 1),
    ("ddp", 2, 4),
    ("fsdp1-full", 2, 4),
    ("fsdp2-full", 2, 1),
]


@pytest.mark.parametrize("by_saver", [True, False], ids=["saver", "explicit"])
@pytest.mark.parametrize(
    ("layout", "before", "after"), [pytest.param(*case, marks=on_ranks(max(case[1:]))) for case in RESHARD_CASES]
)
def test_checkpoints_load_on_other_worlds(
    layout: str,
    before: int,
    after: int,
    by_saver: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    def save() -> None:
        os.environ["WORLD_SIZE"] = str(before)
        trainer, ema, recorder = make_saving_trainer(
            layout, tmp_path / "saver", max_duration="4ba", train_dataloader=make_dataloader(count=20)
        )
        fit(trainer)
        trainer.save_checkpoint(str(tmp_path / "explicit" / "ep{epoch}-ba{batch}-rank{rank}"))
        expected = averages(ema)
        if dist.get_rank() == 0:
            torch.save((without_batch_stats(recorder.weights_after_batch[-1]), expected), tmp_path / "expected.pt")

    def load() -> None:
        os.environ["WORLD_SIZE"] = str(after)
        trainer, ema, _ = make_resumed_trainer(
            layout, checkpoint_path(tmp_path / ("saver" if by_saver else "explicit"), 4)
        )
        trainer.eval()
        live, average = torch.load(tmp_path / "expected.pt")
        assert_same(without_batch_stats(full_tensors(trainer.state)), live)
        assert_averages(ema, average)

    run_in_world(before, tmp_path, save)
    run_in_world(after, tmp_path, load)


class BFloat16Classifier(ComposerClassifier):
    """A classifier with bfloat16 weights, which would round float32 averages."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(6, 7), torch.nn.ReLU(), torch.nn.Linear(7, 5)]
        super().__init__(torch.nn.Sequential(*layers).bfloat16(), num_classes=5)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.module(batch[0].bfloat16()).float()


@composer_layouts("ddp", "fsdp2")
def test_float32_averages_of_narrow_weights_round_trip(layout: str, tmp_path: Path) -> None:
    trainer, ema, uninterrupted = make_saving_trainer(layout, tmp_path, model=BFloat16Classifier())
    fit(trainer)
    resumed_trainer, resumed_ema, resumed = make_resumed_trainer(
        layout, checkpoint_path(tmp_path, 4), model=BFloat16Classifier(seed=1)
    )
    fit(resumed_trainer)
    assert_same(resumed.weights_after_batch[-1], uninterrupted.weights_after_batch[-1])
    assert ema.ema is not None
    assert resumed_ema.ema is not None
    exact = ema.ema.full_state_dict(dtype=torch.float32)
    assert_same(resumed_ema.ema.full_state_dict(dtype=torch.float32), exact)


@composer_layouts("ddp", "fsdp1", "fsdp2")
def test_a_checkpoint_without_averages_starts_them_from_its_weights(layout: str, tmp_path: Path) -> None:
    before = Recorder()
    fit(make_trainer(layout, callbacks=[before], save_folder=str(tmp_path), save_interval="4ba"), "4ba")
    trainer, ema, after = make_resumed_trainer(layout, checkpoint_path(tmp_path, 4))
    with pytest.warns(UserWarning, match=r"checkpoint.*averages.*0\.0dur.*\b4ba\b"):
        trainer.fit()
    actual = averages(ema)
    if dist.get_rank() == 0:
        assert_close(
            actual,
            without_batch_stats(
                reference_average([before.weights_after_batch[3], *after.weights_after_batch], ema.smoothing)
            ),
        )


@composer_layouts("ddp", "fsdp1", "fsdp2")
def test_averages_of_another_model_are_refused(layout: str, tmp_path: Path) -> None:
    class UnfrozenClassifier(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.frozen.requires_grad_()

    trainer, _, _ = make_saving_trainer(layout, tmp_path)
    fit(trainer, "4ba")
    ignored = ["state/optimizers/*"]
    with pytest.raises(ValueError, match=r"checkpoint.*averages.*\bnet\.frozen\.bias"):
        make_resumed_trainer(layout, checkpoint_path(tmp_path, 4), model=UnfrozenClassifier(), load_ignore_keys=ignored)


def composer_averages(ema: composer.algorithms.EMA) -> dict[str, Tensor]:
    """The averages of Composer's own EMA by canonical name, without integer buffers, which it truncates."""
    everything = {**ema.ema_model.named_parameters_dict, **ema.ema_model.named_buffers_dict}
    named = {name.removeprefix("module."): tensor for name, tensor in everything.items()}
    return {name: tensor for name, tensor in named.items() if tensor.is_floating_point() and "scratch" not in name}


@pytest.mark.parametrize("by_saver", [True, False], ids=["saver", "explicit"])
@composer_layouts("ddp", "plain")
def test_checkpoints_go_from_composers_own_ema_to_ours_and_back(layout: str, by_saver: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """Two algorithms train four batches each; every combination ends with the averages of Composer's own EMA alone."""
    ends: dict[str, dict[str, Tensor]] = {}
    for first in (composer.algorithms.EMA, EMA):
        for second in (composer.algorithms.EMA, EMA):
            name = f"{first.__module__} to {second.__module__}"
            folder = tmp_path / name.replace(" ", "-")
            first_trainer = make_trainer(
                layout,
                first(half_life=HALF_LIFE),
                max_duration="4ba",
                save_folder=str(folder / "saver"),
                save_interval="4ba",
            )
            fit(first_trainer)
            first_trainer.save_checkpoint(str(folder / "explicit" / "ep{epoch}-ba{batch}-rank{rank}"))
            path = checkpoint_path(folder / ("saver" if by_saver else "explicit"), 4)
            ema = second(half_life=HALF_LIFE)
            fit(make_trainer(layout, ema, load_path=path))
            if second is EMA:
                assert isinstance(ema, EMA)
                assert ema.ema is not None
                ends[name] = {n: t for n, t in ema.ema.full_state_dict().items() if isinstance(t, Tensor)}
            else:
                ends[name] = composer_averages(ema)
    expected = ends.pop("composer.algorithms.ema.ema to composer.algorithms.ema.ema")
    for actual in ends.values():
        assert actual or dist.get_rank() != 0
        assert_close(actual, {name: tensor for name, tensor in expected.items() if dist.get_rank() == 0})


def older_algorithm_states(average: Classifier, live: Classifier, *, is_active: bool) -> dict[str, dict[str, Any]]:
    """The algorithm's part of a checkpoint as older versions of Composer wrote it, by version."""
    unnamed_tensors = [
        {"parameters": [parameter.detach() for parameter in model.parameters()], "buffers": list(model.buffers())}
        for model in (average, live)
    ]
    flags = {"ema_weights_active": is_active, "ema_started": True}
    states = {"ema_model": average.state_dict(), "training_model": live.state_dict()}
    return {
        "0.11": {"repr": "EMA()", **states, **flags},
        "0.7": dict(zip(("ema_model", "training_model"), unnamed_tensors, strict=True)),
    }


@pytest.mark.parametrize(("version", "is_active"), [("0.11", True), ("0.11", False), ("0.7", False)])
@composer_layouts("plain", "ddp")
def test_older_formats_are_read(layout: str, version: str, is_active: bool, tmp_path: Path) -> None:  # noqa: FBT001
    trainer, _, _ = make_saving_trainer(layout, tmp_path / "run")
    fit(trainer, "4ba")
    trainer.save_checkpoint(str(tmp_path / "now" / "ep{epoch}-ba{batch}-rank{rank}"))
    path = checkpoint_path(tmp_path / "now", 4)
    average, live = Classifier(seed=2), Classifier(seed=3)
    average.net.frozen.load_state_dict(live.net.frozen.state_dict())
    if not dist.is_initialized() or dist.get_rank() == 0:
        everything = torch.load(path, weights_only=False)
        everything["state"]["model"] = (average if is_active else live).state_dict()
        algorithm_state = older_algorithm_states(average, live, is_active=is_active)[version]
        everything["state"]["algorithms"] = [("EMA", algorithm_state)]
        torch.save(everything, path)
    dist.barrier()
    resumed_trainer, ema, _ = make_resumed_trainer(layout, path)
    resumed_trainer.eval()
    assert_same(without_batch_stats(full_tensors(resumed_trainer.state)), without_batch_stats(dict(live.state_dict())))
    assert_averages(ema, without_batch_stats(dict(average.state_dict())))


@on_ranks(2)
def test_a_custom_load_planner_is_refused_with_averages(tmp_path: Path) -> None:
    trainer, _, _ = make_saving_trainer("fsdp1", tmp_path)
    fit(trainer, "4ba")
    settings = {"fsdp": {"state_dict_type": "sharded", "load_planner": DefaultLoadPlanner()}}
    with pytest.raises(ValueError, match=r"load_planner.*FSDP.*DefaultLoadPlanner"):
        make_resumed_trainer("fsdp1", checkpoint_path(tmp_path, 4), parallelism_config=settings)


@pytest.mark.parametrize(
    ("settings", "saved_every", "batch"),
    [
        ({"half_life": "2ep"}, "2ba", 2),
        ({"half_life": "2ep"}, "2ba", 4),
        ({"half_life": "2ep", "update_interval": "2ep"}, "3ba", 6),
        ({"half_life": "3ba", "ema_start": "1ep"}, "1ep", 4),
        ({"half_life": "3ba", "ema_start": "0.5dur"}, "4ba", 4),
        ({"half_life": "6ba", "update_interval": "3ba"}, "4ba", 4),
    ],
    ids=str,
)
@composer_layouts("plain")
def test_start_and_interval_resume_as_without_interruption(
    layout: str, settings: dict[str, Any], saved_every: str, batch: int, tmp_path: Path
) -> None:
    def train_with(ema: EMA, **given: Any) -> EMA:  # noqa: ANN401
        fit(make_trainer(layout, ema, max_duration="3ep", train_dataloader=make_dataloader(count=4), **given))
        return ema

    uninterrupted = train_with(EMA(**settings), save_folder=str(tmp_path), save_interval=saved_every)
    resumed = train_with(EMA(**settings), model=Classifier(seed=1), load_path=checkpoint_path(tmp_path, batch))
    assert uninterrupted.ema is not None
    assert resumed.ema is not None
    assert resumed.ema.updates == uninterrupted.ema.updates
    assert_same(averages(resumed), averages(uninterrupted))


@composer_layouts("plain")
def test_a_second_fit_does_not_restart_the_averages(layout: str) -> None:
    ema = EMA(half_life="2ep")
    trainer = make_trainer(layout, ema, max_duration="2ep", train_dataloader=make_dataloader(count=4))
    fit(trainer, "2ba")
    fit(trainer, "2ba")
    assert ema.ema is not None
    assert ema.ema.updates == 1


@composer_layouts("plain", "ddp", "fsdp2")
def test_live_weights_are_in_the_model_right_after_loading(layout: str, tmp_path: Path) -> None:
    trainer, _, recorder = make_saving_trainer(layout, tmp_path)
    fit(trainer, "4ba")
    resumed_trainer, ema, _ = make_resumed_trainer(layout, checkpoint_path(tmp_path, 4))
    assert ema.ema_started
    assert_same(
        without_batch_stats(full_tensors(resumed_trainer.state)), without_batch_stats(recorder.weights_after_batch[-1])
    )


@composer_layouts("fsdp2")
def test_an_unfilled_load_template_is_discarded(layout: str, tmp_path: Path) -> None:
    fit(make_trainer(layout, save_folder=str(tmp_path / "without"), save_interval="4ba"), "4ba")
    trainer, _, _ = make_resumed_trainer(layout, checkpoint_path(tmp_path / "without", 4))
    assert trainer.state.ema_dist is None
    assert trainer.state.fsdp_config.load_planner is None
    assert type(trainer.state.fsdp_config).__name__ == "FSDP2Config"


@composer_layouts("plain")
def test_an_instance_in_a_second_trainer_starts_over(layout: str) -> None:
    ema = EMA(half_life="3ba")
    fit(make_trainer(layout, ema))
    trainer = make_trainer(layout, ema, model=Classifier(seed=1), max_duration="2ba")
    assert not ema.ema_started
    fit(trainer)
    assert ema.ema is not None
    assert ema.ema.updates == 2
    assert ema.ema.model is trainer.state.model


@composer_layouts("ddp", "fsdp2")
def test_only_the_weights_are_loaded_where_only_they_are_asked_for(layout: str, tmp_path: Path) -> None:
    trainer, _, recorder = make_saving_trainer(layout, tmp_path)
    fit(trainer, "4ba")
    resumed_trainer, ema, _ = make_resumed_trainer(layout, checkpoint_path(tmp_path, 4), load_weights_only=True)
    assert not ema.ema_started
    assert_close(
        without_batch_stats(full_tensors(resumed_trainer.state)),
        without_batch_stats(reference_average(recorder.weights_after_batch, 2 ** (-1 / 3))),
    )
    fit(resumed_trainer, "1ba")
    assert ema.ema_started


@composer_layouts("ddp", "fsdp2")
def test_averages_may_be_left_out_of_what_is_loaded(layout: str, tmp_path: Path) -> None:
    trainer, _, recorder = make_saving_trainer(layout, tmp_path)
    fit(trainer, "4ba")
    ignored = ["state/algorithms", "state/ema_dist/*"]
    resumed_trainer, ema, _ = make_resumed_trainer(layout, checkpoint_path(tmp_path, 4), load_ignore_keys=ignored)
    assert not ema.ema_started
    # The saver's file has the averages as the model's weights, and the live ones in what is left out.
    assert_close(
        without_batch_stats(full_tensors(resumed_trainer.state)),
        without_batch_stats(reference_average(recorder.weights_after_batch, ema.smoothing)),
    )
    with pytest.warns(UserWarning, match=r"checkpoint.*averages.*0\.0dur.*\b4ba\b"):
        resumed_trainer.fit()
    assert ema.ema is not None
    assert ema.ema.updates == 4


@composer_layouts("ddp", "fsdp2")
def test_a_checkpoint_at_the_end_of_an_iteration_is_resumed(layout: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_duration": "2ep", "train_dataloader": make_dataloader(count=8)}
    trainer, ema, uninterrupted = make_saving_trainer(layout, tmp_path, save_interval="1iter", **settings)
    trainer.state._iteration_length = "1ep"  # noqa: SLF001  Composer has no public setter
    fit(trainer)
    resumed_trainer, resumed_ema, resumed = make_resumed_trainer(layout, checkpoint_path(tmp_path, 4), **settings)
    fit(resumed_trainer)
    assert_resumed(resumed, uninterrupted, after=4)
    assert_same(averages(resumed_ema), averages(ema))


@composer_layouts("ddp", "fsdp2")
def test_each_of_several_savers_writes_the_averages_as_weights(layout: str, tmp_path: Path) -> None:
    name = "ep{epoch}-ba{batch}-rank{rank}.pt"
    often = CheckpointSaver(str(tmp_path / "often"), filename=name, save_interval="2ba")
    weights = CheckpointSaver(str(tmp_path / "weights"), filename=name, save_interval="4ba", weights_only=True)
    recorder, ema = Recorder(), EMA(half_life=HALF_LIFE)
    trainer = make_trainer(layout, ema, callbacks=[recorder, often, weights])
    fit(trainer)
    for folder, batch in (("often", 2), ("often", 4), ("weights", 4)):
        path = checkpoint_path(tmp_path / folder, batch)
        plain = make_trainer(layout, model=Classifier(seed=1), load_path=path, load_weights_only=True)
        assert_close(
            without_batch_stats(full_tensors(plain.state)),
            without_batch_stats(reference_average(recorder.weights_after_batch[:batch], ema.smoothing)),
        )


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning")  # the saver's, at the end of each fit
@composer_layouts("ddp", "fsdp2")
def test_a_checkpoint_to_the_save_folder_has_the_live_weights_and_is_resumed(layout: str, tmp_path: Path) -> None:
    trainer, ema, uninterrupted = make_saving_trainer(layout, tmp_path)
    fit(trainer, "3ba")
    trainer.save_checkpoint_to_save_folder()
    fit(trainer, "5ba")
    plain = make_trainer(
        layout, model=Classifier(seed=1), load_path=checkpoint_path(tmp_path, 3), load_weights_only=True
    )
    assert_same(
        without_batch_stats(full_tensors(plain.state)), without_batch_stats(uninterrupted.weights_after_batch[2])
    )
    resumed_trainer, resumed_ema, resumed = make_resumed_trainer(layout, checkpoint_path(tmp_path, 3))
    fit(resumed_trainer)
    assert_resumed(resumed, uninterrupted, after=3)
    assert_same(averages(resumed_ema), averages(ema))


@composer_layouts("ddp", "fsdp2")
def test_an_autoresumed_run_is_bit_identical(layout: str, tmp_path: Path) -> None:
    trainer, ema, uninterrupted = make_saving_trainer(layout, tmp_path / "undisturbed")
    fit(trainer)
    settings = {"save_folder": str(tmp_path / "broken"), "save_interval": "4ba", "autoresume": True, "run_name": "it"}
    broken = make_trainer(layout, EMA(half_life=HALF_LIFE), **settings)
    fit(broken, "4ba")
    broken.close()
    recorder, resumed_ema = Recorder(), EMA(half_life=HALF_LIFE)
    resumed_trainer = make_trainer(layout, resumed_ema, model=Classifier(seed=1), callbacks=[recorder], **settings)
    fit(resumed_trainer)
    assert_resumed(recorder, uninterrupted, after=4)
    assert_same(averages(resumed_ema), averages(ema))


class LinearWithExtraState(torch.nn.Linear):
    """A layer whose extra state is a dictionary, which DCP flattens."""

    def __init__(self, seed: int) -> None:
        super().__init__(6, 7)
        self.scale: dict[str, Any] = {"scale": torch.tensor([float(seed)]), "seed": seed, "none": {}}

    def get_extra_state(self) -> dict[str, Any]:
        return self.scale

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.scale = state


class ClassifierWithExtraState(ComposerClassifier):
    """A classifier with one layer that has an extra state."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(
            torch.nn.Sequential(LinearWithExtraState(seed), torch.nn.ReLU(), torch.nn.Linear(7, 5)), num_classes=5
        )

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.module(batch[0])


@composer_layouts("ddp", "fsdp1", "fsdp2")
def test_extra_states_of_modules_are_resumed(layout: str, tmp_path: Path) -> None:
    uninterrupted, resumed = Recorder(), Recorder()
    fit(make_saving_trainer(layout, tmp_path, model=ClassifierWithExtraState(), callbacks=[uninterrupted])[0])
    resumed_trainer, _, _ = make_resumed_trainer(
        layout, checkpoint_path(tmp_path, 4), model=ClassifierWithExtraState(seed=1), callbacks=[resumed]
    )
    fit(resumed_trainer)
    for weights, expected in zip(resumed.weights_after_batch, uninterrupted.weights_after_batch[4:], strict=True):
        assert_same(weights, expected)
    (layer,) = (module for module in resumed_trainer.state.model.modules() if isinstance(module, LinearWithExtraState))
    assert layer.scale["seed"] == 0
    assert layer.scale["scale"] == 0


def is_block_parameter(name: str, parameter: Tensor) -> bool:
    return parameter.requires_grad and "blocks" in name


@pytest.mark.parametrize(
    "settings", [{"buffers": "copy"}, {"dtype": torch.float64}, {"select": is_block_parameter}], ids=list
)
@composer_layouts("ddp", "fsdp2")
def test_sharded_ema_settings_are_resumed(layout: str, settings: dict[str, Any], tmp_path: Path) -> None:
    recorder, ema = Recorder(), EMA(half_life=HALF_LIFE, **settings)
    fit(make_trainer(layout, ema, callbacks=[recorder], save_folder=str(tmp_path), save_interval="4ba"))
    resumed_ema = EMA(half_life=HALF_LIFE, **settings)
    fit(make_trainer(layout, resumed_ema, model=Classifier(seed=1), load_path=checkpoint_path(tmp_path, 4)))
    assert ema.ema is not None
    assert resumed_ema.ema is not None
    actual, expected = (
        without_batch_stats(each.full_state_dict(dtype=torch.float64)) for each in (resumed_ema.ema, ema.ema)
    )
    assert_same(actual, expected)
    if dist.get_rank() == 0:
        average = reference_average(recorder.weights_after_batch, ema.smoothing)
        selects_all = "select" not in settings
        assert_close(
            expected,
            {
                n: tensor
                for n, tensor in without_batch_stats(average).items()
                if "mask" not in n and (selects_all or "blocks" in n)
            },
        )
