"""What docs/comparison.md says about other packages, shown on the packages themselves: ``tox -e peers``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_dist import ShardedEMA
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, layouts, make_net, wrap
from tests.support.torch_2_7 import IS_BEFORE_TORCH_2_8

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING

REASON = "needs the package it compares with: tox -e peers"
DECAY = 0.999


class Averages:
    """One way to average: `update` and `tensors` are what a training loop would call and keep."""

    def __init__(self, update: Callable[[], object], tensors: Callable[[], Iterable[Tensor]]) -> None:
        self.update, self.tensors = update, tensors


def by_torch(model: nn.Module) -> Averages:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return Averages(lambda: averaged.update_parameters(model), averaged.module.parameters)


def by_lightning(model: nn.Module) -> Averages:
    """The callback's own hooks, called as its Trainer does."""
    lightning = pytest.importorskip("pytorch_lightning", reason=REASON)

    class Wrapper(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

    callback = lightning.callbacks.EMAWeightAveraging(decay=DECAY)
    trainer, module = SimpleNamespace(global_step=0), Wrapper()
    callback.setup(trainer, module, "fit")

    def update() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, trainer.global_step)

    return Averages(update, callback._average_model.module.parameters)  # noqa: SLF001  it has no public name


def by_diffusers(model: nn.Module, **settings: Any) -> Averages:  # noqa: ANN401
    diffusers = pytest.importorskip("diffusers.training_utils", reason=REASON)
    averages = diffusers.EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY, **settings)
    return Averages(lambda: averages.step(model.parameters()), lambda: averages.shadow_params)


def by_us(model: nn.Module) -> Averages:
    ema = ShardedEMA(model, decay=DECAY)
    tensors = ema.state_dict()["tracks"]["default"]["averages"]
    return Averages(ema.update, tensors.values)


OTHERS = pytest.mark.parametrize("averaged", [by_torch, by_diffusers, by_lightning])
Way = Callable[[nn.Module], Averages]


@pytest.mark.world_size(2)
@pytest.mark.parametrize("averaged", [by_torch, by_lightning])
def test_a_second_model_cannot_be_made_of_an_fsdp2_model(averaged: Way) -> None:
    with pytest.raises(AssertionError, match="deepcopy"):
        averaged(wrap("fsdp2", make_net("fsdp2")))


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("averaged", "share"), [(by_torch, 1.0), (by_diffusers, 1.0), (by_lightning, 1.0), (by_us, 0.5)]
)
def test_share_of_the_model_that_a_rank_keeps_under_ddp(averaged: Way, share: float) -> None:
    """The others get the module inside DDP, as their documentation does it."""
    model = DistributedDataParallel(nn.Linear(64, 64))
    kept = averaged(model if averaged is by_us else model.module).tensors()
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in kept)
    assert sum(tensor.numel() for tensor in local) == share * (64 * 64 + 64)


@OTHERS
def test_bfloat16_averages_stand_still(averaged: Way) -> None:
    """The live weight is 1.5 for 5000 updates at decay 0.999; the average stays at the 1 that it began with."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1)
    averages = averaged(model)
    averages.update()  # the first update copies
    with torch.no_grad():
        model.weight.fill_(1.5)
    for _ in range(5000):
        averages.update()
    assert [average.item() for average in averages.tensors()] == [1]


def test_averages_of_bfloat16_weights_move_here() -> None:
    """Under the same updates; they are float32 unless told otherwise."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1)
    averages = by_us(model)
    with torch.no_grad():
        model.weight.fill_(1.5)
    for _ in range(5000):
        averages.update()
    assert [average.item() for average in averages.tensors()] == [pytest.approx(1.5 - 0.5 * DECAY**5000, rel=1e-4)]


def test_torch_cannot_keep_float32_averages_of_bfloat16_weights() -> None:
    model = nn.Linear(2, 2).bfloat16()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY)).float()
    averaged.update_parameters(model)  # the first update copies
    with pytest.raises(RuntimeError, match="dtype"):
        averaged.update_parameters(model)


@pytest.mark.skipif(IS_BEFORE_TORCH_2_8, reason="an operator that this version of torch may shard or not")
@pytest.mark.world_size(2)
def test_diffusers_updates_an_fsdp2_model_and_cannot_evaluate_it_with_foreach() -> None:
    diffusers = pytest.importorskip("diffusers.training_utils", reason=REASON)
    model = wrap("fsdp2", make_net("fsdp2").requires_grad_(requires_grad=True))
    averages = diffusers.EMAModel(model.parameters(), foreach=True)
    averages.step(model.parameters())
    assert all(isinstance(average, DTensor) for average in averages.shadow_params)
    with pytest.raises(NotImplementedError, match="sharding strategy"):
        averages.copy_to(model.parameters())


def test_diffusers_saves_averages_by_position() -> None:
    diffusers = pytest.importorskip("diffusers.training_utils", reason=REASON)
    state = diffusers.EMAModel(nn.Linear(2, 2).parameters()).state_dict()
    assert isinstance(state["shadow_params"], list)


@pytest.mark.filterwarnings("ignore")
def test_an_exception_in_lightnings_validation_leaves_the_averages_in_the_model() -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason=REASON)

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def training_step(self, *_: object) -> Tensor:
            return -self.weight  # each step adds the learning rate, 1

        def validation_step(self, *_: object) -> None:
            raise RuntimeError("out of memory")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        callbacks=[lightning.callbacks.EMAWeightAveraging(decay=0.9)],
        **quiet,
    )
    model = Model()
    batches = torch.utils.data.DataLoader(torch.zeros(5))
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(model, batches, batches)
    assert 1 < model.weight.item() < 2  # five steps made 5 of the live weight; the average began as the first, 1


def test_an_exception_while_evaluating_leaves_diffusers_averages_in_the_model() -> None:
    diffusers = pytest.importorskip("diffusers.training_utils", reason=REASON)
    model = nn.Linear(2, 2)
    averages = diffusers.EMAModel(model.parameters())
    with torch.no_grad():
        model.weight.fill_(5)
    with suppress(RuntimeError):
        averages.store(model.parameters())
        averages.copy_to(model.parameters())
        raise RuntimeError("out of memory")
    assert not model.weight.eq(5).any()


def test_an_exception_while_evaluating_restores_the_live_weights_here() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model)
    with torch.no_grad():
        model.weight.fill_(5)
    with suppress(RuntimeError), ema.swapped():
        raise RuntimeError("out of memory")
    assert model.weight.eq(5).all()


@layouts("plain", "ddp", "fsdp1", "fsdp2", "hsdp", "tp")
def test_updates_here_send_nothing(layout: str) -> None:
    """In one layout of each kind that the comparison lists."""
    model = wrap(layout, make_net(layout))
    ema = ShardedEMA(model)
    with CommDebugMode() as sent:
        ema.update()
    assert sent.get_total_counts() == 0
