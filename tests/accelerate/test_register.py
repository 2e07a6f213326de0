"""accelerate's `save_state` and `load_state` with averages, in loops like those of its examples."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("accelerate", reason="needs accelerate: tox -e frameworks")

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import ProjectConfiguration
from torch import nn
from torch.distributed.tensor import DTensor

from ema_dist import HalfLife, ShardedEMA
from ema_dist.accelerate import register
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING
from tests.support.transformers_runs import (
    assert_close,
    assert_same,
    full_tensors,
    ignored_warnings,
    is_first_rank,
    reference_average,
    start_accelerate,
    trainer_layouts,
)

DECAY = 0.8

pytestmark = [IGNORE_INITIAL_WEIGHTS_WARNING]


class Run:
    """A loop with gradient accumulation over two batches, and averages attached to the prepared optimizer."""

    def __init__(self, layout: str, seed: int = 0, **settings: Any) -> None:  # noqa: ANN401  of Accelerator
        start_accelerate(layout)
        if layout.startswith("fsdp"):
            kind = "FULL_STATE_DICT" if layout == "fsdp2" else "SHARDED_STATE_DICT"
            settings["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=1 if layout == "fsdp1" else 2,
                state_dict_type=kind,
                auto_wrap_policy="size_based_wrap",
                min_num_params=20,
                use_orig_params=True if layout == "fsdp1" else None,
            )
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **settings)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ema = ShardedEMA(self.model, decay=DECAY)
        self.ema.attach(self.optimizer)
        self.weights = [full_tensors(self.model)]

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(100 * step + self.accelerator.process_index)
            for _ in range(2):
                batch = torch.randn(4, 6, generator=generator)
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(batch).square().mean())
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            self.weights.append(full_tensors(self.model))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # torch's, of FSDP1
@trainer_layouts("plain", "ddp", "fsdp1", "fsdp2", "fsdp2-sharded")
def test_a_resumed_run_is_bit_identical(layout: str, tmp_path: Path) -> None:
    """Averages equal the float64 reference, and are loaded by `load_state` into a model with other weights."""
    run = Run(layout)
    register(run.accelerator, run.ema)
    run.train(0, 3)
    run.accelerator.save_state(str(tmp_path / "latest"))
    run.train(3, 4)
    with ignored_warnings():
        run.accelerator.save_state(str(tmp_path / "latest"))  # again, into the same folder
    assert [path.name for path in (tmp_path / "latest" / "ema").iterdir()] == ["step-0000000004"]
    run.train(4, 8)
    averages = run.ema.full_state_dict()
    assert run.ema.steps == 8
    if is_first_rank():
        assert_close(averages, reference_average(run.weights, DECAY))
        assert all(isinstance(tensor, DTensor) == layout.startswith("fsdp2") for tensor in run.model.parameters())

    resumed = Run(layout, seed=1)
    register(resumed.accelerator, resumed.ema)
    if layout == "fsdp1":
        resumed.train(0, 1)  # accelerate 1.15 loads the moments of FSDP1 only into an optimizer that has stepped
    resumed.accelerator.load_state(str(tmp_path / "latest"))
    resumed.train(4, 8)
    assert resumed.ema.steps == 8
    for weights, same in zip(resumed.weights[-4:], run.weights[-4:], strict=True):
        assert_same(weights, same)
    assert_same(resumed.ema.full_state_dict(), averages)


@trainer_layouts()
def test_a_checkpoint_without_averages_starts_them_from_its_weights(layout: str, tmp_path: Path) -> None:
    """Accelerate loads the weights after its hooks under DDP, and before them under FSDP."""
    run = Run(layout)
    run.train(0, 3)
    run.accelerator.save_state(str(tmp_path))
    resumed = Run(layout, seed=1)
    register(resumed.accelerator, resumed.ema)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.accelerator.load_state(str(tmp_path))
    messages = [str(warning.message) for warning in caught if "no averages" in str(warning.message)]
    assert [str(tmp_path) in message for message in messages] == ([True] if is_first_rank() else [])
    assert resumed.ema.steps == 0
    resumed.train(3, 5)
    if is_first_rank():
        reference = reference_average([run.weights[3], *resumed.weights[1:]], DECAY)
    averages = resumed.ema.full_state_dict()
    if is_first_rank():
        assert_close(averages, reference)


@trainer_layouts("ddp")
def test_two_averages_of_one_model_have_two_folders(layout: str, tmp_path: Path) -> None:
    """Until one is removed; the other is not trained with then, and is loaded alone."""
    settings = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)
    run = Run(layout, project_config=settings)
    long = ShardedEMA(run.model, decay=HalfLife(100))
    first, second = register(run.accelerator, run.ema), register(run.accelerator, long, name="long")
    for ema, name in ((run.ema, "third"), (ShardedEMA(run.model), "long")):
        with pytest.raises(ValueError, match=rf"{name}.*remove\(\)"):
            register(run.accelerator, ema, name=name)
    for name in ("", "a/b", ".."):
        with pytest.raises(ValueError, match="name of a folder"):
            register(run.accelerator, ShardedEMA(run.model), name=name)
    with pytest.raises(TypeError, match="Accelerator and a ShardedEMA, got DistributedDataParallel"):
        register(cast(Any, run.model), run.ema)
    run.train(0, 2)
    long.update()
    run.accelerator.save_state()
    second.remove()
    run.accelerator.save_state()
    folders = [tmp_path / "checkpoints" / f"checkpoint_{index}" for index in (0, 1)]
    assert [(folder / "ema").is_dir() for folder in folders] == [True, True]
    assert [(folder / "long").is_dir() for folder in folders] == [True, False]
    register(run.accelerator, long, name="long")
    long.update()
    run.accelerator.load_state(str(folders[0]))
    assert (run.ema.steps, long.steps) == (2, 1)
    assert (first.name, second.name) == ("ema", "long")
    with run.ema.swapped(), pytest.raises(RuntimeError, match=r"inside swapped\(\)"):
        run.accelerator.save_state()


@trainer_layouts("plain", "ddp", "fsdp2")
def test_registering_for_checkpointing_is_refused_on_several_ranks(layout: str, tmp_path: Path) -> None:
    """The file would have the averages of the main process alone; of one process, it has all."""
    run = Run(layout)
    run.accelerator.register_for_checkpointing(run.ema)
    if layout == "plain":
        run.train(0, 2)
        run.accelerator.save_state(str(tmp_path))
        resumed = Run(layout, seed=1)
        resumed.accelerator.register_for_checkpointing(resumed.ema)
        resumed.accelerator.load_state(str(tmp_path))
        assert resumed.ema.steps == 2
        assert_same(resumed.ema.full_state_dict(), run.ema.full_state_dict())
    elif run.accelerator.is_main_process:
        with pytest.raises(TypeError, match=r"ema_dist\.accelerate\.register"):
            run.accelerator.save_state(str(tmp_path))
    else:
        run.accelerator.save_state(str(tmp_path))  # the main process alone writes


@pytest.mark.parametrize("name", ["accelerate", "transformers"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    for module in [module for module in sys.modules if module.startswith(f"ema_dist.{name}")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ModuleNotFoundError, match=f"ema_dist.{name} needs {name}: pip install"):
        import_module(f"ema_dist.{name}")
