"""Runs of Composer's real Trainer on a CPU: a small model, its data, its layouts, and a recorder of its weights."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

pytest.importorskip("composer", reason="needs Composer, which has an environment of its own: tox -e composer")

import composer.core.state
from composer import Algorithm, Callback, Trainer
from composer.core import State
from composer.loggers import Logger
from composer.models import ComposerClassifier, ComposerModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tests.support.layouts import Net

CLASSES = 5
FSDP1 = {"sharding_strategy": "FULL_SHARD", "mixed_precision": "DEFAULT", "state_dict_type": "sharded"}
PARALLELISM_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddp": {},
    "fsdp1": {"fsdp": FSDP1},
    "fsdp1-full": {"fsdp": FSDP1 | {"state_dict_type": "full"}},
    "fsdp2": {"fsdp": {"state_dict_type": "sharded"}},
    "fsdp2-full": {"fsdp": {"state_dict_type": "full"}},
    "hsdp": {"fsdp": FSDP1 | {"sharding_strategy": "HYBRID_SHARD", "data_parallel_replicate_degree": 2}},
}
"""Composer's parallelism_config by name."""

on_ranks = partial(pytest.mark.world_size, timeout=180)


def composer_layouts(*names: str) -> pytest.MarkDecorator:
    """Parametrizes `layout` by name, each on as many ranks as it needs; by default, all that save checkpoints."""
    chosen = names or ("ddp", "fsdp1", "fsdp2", "hsdp", "fsdp1-full", "fsdp2-full")
    ranks = {"plain": 1, "hsdp": 4}
    return pytest.mark.parametrize(
        "layout", [pytest.param(name, marks=on_ranks(ranks.get(name, 2))) for name in chosen]
    )


class Classifier(ComposerClassifier):
    """A `Net` in the attribute `net`, not in `module` as in `ComposerClassifier`."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        net = Net()
        super().__init__(net, num_classes=CLASSES)
        self.net = net
        del self.module

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.net(batch[0])


class Recorder(Callback):
    """Records full weights: the live ones after each batch, and those in the model at other events."""

    def __init__(self) -> None:
        self.weights_after_batch: list[dict[str, Tensor]] = []
        self.model_at_event: list[tuple[str, dict[str, Tensor]]] = []

    def batch_end(self, state: State, _: Logger) -> None:
        self.weights_after_batch.append(full_tensors(state))

    def batch_start(self, state: State, _: Logger) -> None:
        self.model_at_event.append(("batch_start", full_tensors(state)))

    def eval_batch_start(self, state: State, _: Logger) -> None:
        self.model_at_event.append(("eval_batch_start", full_tensors(state)))

    def predict_batch_start(self, state: State, _: Logger) -> None:
        self.model_at_event.append(("predict_batch_start", full_tensors(state)))


def full_tensors(state: State) -> dict[str, Tensor]:
    """Full copies of the tensors in the model by canonical name, on every rank."""
    weights = get_model_state_dict(state.model, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.detach().clone() for name, tensor in weights.items() if isinstance(tensor, Tensor)}


def make_dataloader(size: int = 4, count: int = 12) -> DataLoader[Any]:
    """Random samples and labels: by default, six batches on each of two ranks."""
    generator = torch.Generator().manual_seed(7)
    world = dist.get_world_size() if dist.is_initialized() else 1
    samples = size * count
    pixels = torch.randn(samples, 6, generator=generator)
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    data = TensorDataset(pixels, labels)
    rank = dist.get_rank() if dist.is_initialized() else 0
    sampler = DistributedSampler(data, num_replicas=world, rank=rank, shuffle=False)
    return DataLoader(data, batch_size=size, sampler=sampler)


def make_trainer(
    layout: str,
    *algorithms: Algorithm,
    model: ComposerModel | None = None,
    **settings: Any,  # noqa: ANN401  a Trainer takes anything
) -> Trainer:
    """A Trainer on this rank; `settings` override the defaults below."""
    os.environ |= {"LOCAL_WORLD_SIZE": os.environ.get("WORLD_SIZE", "1"), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ["FSDP_VERSION"] = "2" if layout.startswith("fsdp2") else "1"
    if layout.startswith(("fsdp1", "hsdp")):
        # Composer asks CUDA for the current device when it wraps with FSDP1; all else works on a CPU.
        torch.cuda.current_device = lambda: torch.device("cpu")
    if layout == "fsdp1-full":
        # torch crashes when it offloads a full state dict that is on a CPU already.
        composer.core.state.StateDictOptions = lambda **options: StateDictOptions(**options | {"cpu_offload": False})
    model = model or Classifier()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    defaults: dict[str, Any] = {
        "train_dataloader": make_dataloader(),
        "eval_dataloader": make_dataloader(count=4),
        "max_duration": "8ba",
        "optimizers": torch.optim.AdamW(parameters, lr=1e-2),
        "parallelism_config": PARALLELISM_CONFIGS[layout] or None,
        "precision": "fp32",
        "eval_interval": 0,
        "seed": 17,
    }
    quiet = {"progress_bar": False, "log_to_console": False, "auto_log_hparams": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(model=model, algorithms=list(algorithms), device="cpu", **quiet, **defaults | settings)


def checkpoint_path(folder: Path, batch: int) -> str:
    """The path of the checkpoint of a batch: a file or a folder, the last one if there are two."""
    return str(max(path for path in folder.iterdir() if f"-ba{batch}-" in f"{path.name}-"))


def fit(trainer: Trainer, duration: str | None = None) -> None:
    """Train, and ignore the warnings of Composer and torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(duration=duration)


def reference_average(weights: list[dict[str, Tensor]], smoothing: float) -> dict[str, Tensor]:
    """The oracle: the moving average of full weights in float64."""
    average: dict[str, Tensor] = {}
    for full in weights:
        for name, live in full.items():
            if live.is_floating_point():
                average[name] = average.get(name, live.double()) * smoothing + live.double() * (1 - smoothing)
    return average


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Each tensor of `right` is in `left`, within the tolerance."""
    for name, expected in right.items():
        torch.testing.assert_close(left[name].double(), expected.double(), rtol=tolerance, atol=tolerance, msg=name)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same names, and bit-identical tensors."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different
