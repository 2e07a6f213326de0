"""The recipe of docs/torchtitan.md, as printed, with torchtitan's real CheckpointManager and OptimizersContainer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torchtitan", reason="needs torchtitan: tox -e frameworks")

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer.optimizer import ParamGroupConfig

from ema_dist import HalfLife, ShardedEMA
from tests.support import ROOT
from tests.support.cli_runs import run_ok
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal, full_weights

pytestmark = [
    IGNORE_INITIAL_WEIGHTS_WARNING,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

RECIPE = re.search(
    r'^```py title="averages.py"\n(.*?)^```$', (ROOT / "docs" / "torchtitan.md").read_text(), re.MULTILINE | re.DOTALL
)
DECAY = 0.8


class Counter:
    """A state of the checkpoint: stands for the Trainer's own, and for the data loader."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Run:
    """What a torchtitan Trainer holds, built from its own components, and its loop."""

    def __init__(self, folder: Path, *, seed: int = 0, has_averages: bool = True, **config: Any) -> None:  # noqa: ANN401
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 1))
        for layer in (model[0], model[2], model):
            fully_shard(layer)
        groups = [
            ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs={"lr": 0.05})
            for pattern, name in ((r"bias$", "Adam"), (".*", "AdamW"))
        ]
        optimizers = OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
        self.model_parts = [model]
        self.optimizers = optimizers.build(model_parts=self.model_parts)
        schedulers = LRSchedulersContainer.Config(warmup_steps=2)
        self.lr_schedulers = schedulers.build(optimizers=self.optimizers, training_steps=20)
        self.train_state = Counter()
        settings = {"enable": True, "interval": 2, "keep_latest_k": 0} | config
        self.checkpointer = CheckpointManager.Config(**settings).build(
            dataloader=Counter(),
            model_parts=self.model_parts,
            optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers,
            states={"train_state": self.train_state},
            sd_adapter=None,
            base_folder=str(folder),
        )
        self.validated: list[dict[str, Tensor]] = []
        self.validator = SimpleNamespace(validate=lambda *_: self.validated.append(full_weights(model)))
        self.history: list[dict[str, Tensor]] = [full_weights(model)]
        if has_averages:
            assert RECIPE is not None
            recipe: dict[str, Callable[..., ShardedEMA]] = {}
            exec(RECIPE[1], recipe)
            self.ema = recipe["add_ema"](self, decay=DECAY)

    def train(self, until: int, *, last: int = 100) -> None:
        """Trains as `Trainer.train` does, up to step `until` of `last`."""
        while self.train_state.step < until:
            self.train_state.step += 1
            step = self.train_state.step
            generator = torch.Generator().manual_seed(step * 2 + dist.get_rank())
            self.optimizers.zero_grad()
            self.model_parts[0](torch.randn(4, 6, generator=generator)).square().mean().backward()
            self.checkpointer.maybe_wait_for_staging()
            self.optimizers.step()
            self.lr_schedulers.step()
            self.history.append(full_weights(self.model_parts[0]))
            self.checkpointer.save(step, last_step=step == last)
            self.validator.validate(self.model_parts, step)
        self.checkpointer.maybe_wait_for_saving()
        dist.barrier()

    def weights(self) -> dict[str, Tensor]:
        """The full live weights."""
        return full_weights(self.model_parts[0])


def entries(folder: Path, step: int) -> set[str]:
    """The names in a checkpoint."""
    return {*FileSystemReader(folder / "checkpoint" / f"step-{step}").read_metadata().state_dict_metadata}


def averages(run: Run) -> dict[str, Tensor]:
    """The full averages on every rank: what validation would see."""
    run.validator.validate(run.model_parts, 0)
    return run.validated[-1]


@pytest.mark.world_size(2, timeout=120)
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_resumed_run_equals_an_unbroken_one(mode: str, tmp_path: Path) -> None:
    """Bit for bit, from a save in the middle; validation sees the averages, which float64 confirms."""
    unbroken = Run(tmp_path, async_mode=mode)
    assert len(unbroken.optimizers.optimizers) == 2
    unbroken.train(6, last=6)
    assert unbroken.ema.steps == unbroken.ema.updates == 6
    expected = unbroken.history[0]
    for live in unbroken.history[1:]:
        expected = {name: DECAY * value + (1 - DECAY) * live[name] for name, value in expected.items()}
    for name, value in unbroken.validated[-1].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)

    assert "ema.format" in entries(tmp_path, 4)
    assert not any(name.startswith("ema.") for name in entries(tmp_path, 6))  # the last save is of the model alone
    resumed = Run(tmp_path, seed=1, async_mode=mode, last_save_model_only=False)
    assert resumed.checkpointer.load(4)
    assert (resumed.train_state.step, resumed.ema.steps) == (4, 4)
    loaded = averages(resumed)
    if dist.get_rank() == 0:
        run_ok("export", str(tmp_path / "checkpoint" / "step-4"), str(tmp_path / "averaged"), "--entry", "ema")
        assert_bitwise_equal(load_file(tmp_path / "averaged" / "model.safetensors"), loaded)
    resumed.train(6, last=6)
    assert_bitwise_equal(resumed.weights(), unbroken.weights())
    assert_bitwise_equal(averages(resumed), averages(unbroken))
    assert resumed.ema.metrics() == unbroken.ema.metrics()
    assert "ema.format" in entries(tmp_path, 6)


@pytest.mark.world_size(2, timeout=120)
def test_from_weights_alone_the_averages_start_from_them(tmp_path: Path) -> None:
    """A model-only folder by ``initial_load_path``, and a checkpoint of a run that had no averages."""
    source = Run(tmp_path / "source", has_averages=False)
    source.train(2, last=2)
    model_only = str(tmp_path / "source" / "checkpoint" / "step-2")
    warm = Run(tmp_path / "warm", seed=1, initial_load_path=model_only)
    assert warm.checkpointer.load()
    assert_bitwise_equal(averages(warm), source.weights())

    without = Run(tmp_path / "without", has_averages=False)
    without.train(2)
    with pytest.raises(CheckpointException, match=r"ema\.format"):
        Run(tmp_path / "without", seed=1).checkpointer.load()
    later = Run(tmp_path / "without", seed=1, exclude_from_loading=["ema"])
    assert later.checkpointer.load()
    assert_bitwise_equal(averages(later), without.weights())
    later.train(3)
    assert later.ema.steps == 1


def test_several_parts_on_a_rank_are_refused() -> None:
    recipe: dict[str, Any] = {}
    assert RECIPE is not None
    exec(RECIPE[1], recipe)
    with pytest.raises(ValueError, match="too many"):
        recipe["add_ema"](SimpleNamespace(model_parts=[nn.Linear(2, 2), nn.Linear(2, 2)]), HalfLife(10))
