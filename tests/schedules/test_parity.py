"""Step by step the same averages as the classes that users come from, within float32 rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ema_dist import InverseGamma, Schedule, ShardedEMA, Uniform, Warmup
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


STEPS = 40
REASON = "needs the package it compares with: tox -e peers"


def require_equal_averages(
    model: nn.Module,
    update: Callable[[int], None],
    averages: Callable[[], Iterable[Tensor]],
    law: Schedule | float,
    **settings: Any,  # noqa: ANN401
) -> None:
    """Updates both for `STEPS` steps, and compares them after each.

    Args:
        update: updates the other averages; gets the number of the step, from 1.
        averages: the other averages, in the order of the parameters.
    """
    ema = ShardedEMA(model, decay=law, **settings)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        ema.update()
        update(step)
        for expected, (name, actual) in zip(averages(), ema.full_state_dict().items(), strict=True):
            torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize(
    ("function", "law"), [(get_ema_multi_avg_fn(0.999), 0.999), (get_swa_multi_avg_fn(), Uniform())], ids=["ema", "swa"]
)
def test_torch_averaged_model(function: Any, law: Schedule | float) -> None:  # noqa: ANN401
    """Its first update copies, as ours do until ``start``; SWA counts that copy as the first value, Uniform from it."""
    model = nn.Linear(3, 2)
    theirs = AveragedModel(model, multi_avg_fn=function)
    start = 0 if isinstance(law, Uniform) else 1
    require_equal_averages(model, lambda _: theirs.update_parameters(model), theirs.module.parameters, law, start=start)


@pytest.fixture
def timm_class() -> Any:  # noqa: ANN401
    """Without timm's package, which imports torchvision: that does not load beside every build of torch."""
    spec = find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip(REASON)
    return run_path(str(Path(spec.origin).with_name("utils") / "model_ema.py"))["ModelEmaV3"]


@pytest.mark.parametrize("min_decay", [0.0, 0.3])
def test_timm_with_warmup(min_decay: float, timm_class: Any) -> None:  # noqa: ANN401
    model = nn.Linear(3, 2)
    theirs = timm_class(model, decay=0.85, min_decay=min_decay, use_warmup=True, warmup_power=0.75)
    law = InverseGamma(0.85, power=0.75, min_decay=min_decay)
    require_equal_averages(model, lambda step: theirs.update(model, step=step), theirs.module.parameters, law)


def test_timm_without_warmup(timm_class: Any) -> None:  # noqa: ANN401
    model = nn.Linear(3, 2)
    theirs = timm_class(model, decay=0.9)
    require_equal_averages(model, lambda _: theirs.update(model), theirs.module.parameters, 0.9)


@pytest.mark.parametrize(
    ("settings", "law"),
    [
        ({"decay": 0.8}, Warmup(0.8)),
        ({"decay": 0.85, "use_ema_warmup": True, "power": 0.75}, InverseGamma(0.85, power=0.75)),
        (
            {"decay": 0.9, "use_ema_warmup": True, "inv_gamma": 2.0, "min_decay": 0.2},
            InverseGamma(0.9, 2.0, 2 / 3, 0.2),
        ),
    ],
    ids=["default", "warm-up", "min_decay"],
)
@pytest.mark.parametrize("start", [0, 5])
def test_diffusers(settings: dict[str, Any], law: Schedule, start: int) -> None:
    diffusers = pytest.importorskip("diffusers.training_utils", reason=REASON)
    model = nn.Linear(3, 2)
    theirs = diffusers.EMAModel(model.parameters(), update_after_step=start, **settings)
    require_equal_averages(
        model, lambda _: theirs.step(model.parameters()), lambda: theirs.shadow_params, law, start=start
    )


def test_ema_pytorch() -> None:
    """At each step; with an interval it has a phase of its own."""
    ema_pytorch = pytest.importorskip("ema_pytorch", reason=REASON)
    model = nn.Linear(3, 2)
    theirs = ema_pytorch.EMA(model, beta=0.85, update_after_step=0, update_every=1, power=0.75)
    law = InverseGamma(0.85, power=0.75)
    require_equal_averages(model, lambda _: theirs.update(), theirs.ema_model.parameters, law)


def test_lightning() -> None:
    """Its callback updates torch's `AveragedModel`, whose first update copies."""
    callbacks = pytest.importorskip("pytorch_lightning.callbacks", reason=REASON)
    model = nn.Linear(3, 2)
    callback = callbacks.EMAWeightAveraging(decay=0.9)
    theirs = callback._average_model = AveragedModel(model, **callback._kwargs)  # noqa: SLF001
    trainer = type("Trainer", (), {"global_step": 0})()

    def update(step: int) -> None:
        trainer.global_step = step
        callback.on_train_batch_end(trainer, model, None, None, step)

    require_equal_averages(model, update, theirs.module.parameters, 0.9, start=1)
