"""Runs of the real Trainer and of accelerate's loops on a CPU: tiny models, generated data, layouts, and a recorder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers: tox -e frameworks")

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

Samples = list[dict[str, Tensor]]

FSDP_CONFIG = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}
FSDP_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": FSDP_CONFIG | {"state_dict_type": "FULL_STATE_DICT"}},
    "fsdp2-sharded": {"fsdp": True, "fsdp_config": FSDP_CONFIG | {"state_dict_type": "SHARDED_STATE_DICT"}},
}
"""Arguments of TrainingArguments by layout."""


def trainer_layouts(*names: str, timeout: float = 120) -> pytest.MarkDecorator:
    """Parametrizes `layout` by name, each on as many ranks as it needs; by default, all."""
    return pytest.mark.parametrize(
        "layout",
        [
            pytest.param(name, marks=pytest.mark.world_size(1 if name == "plain" else 2, timeout=timeout))
            for name in names or FSDP_SETTINGS
        ],
    )


def start_accelerate(layout: str) -> None:
    """Make accelerate see this rank's CPU, and shard on it if the layout does."""
    set_environment(layout)
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001  accelerate's own tests do the same
    PartialState(cpu=True)
    allow_sharding(layout)


def set_environment(layout: str) -> None:
    """Set the variables that accelerate reads in addition to torchrun's; for one process, remove torchrun's."""
    if layout == "plain":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    else:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def allow_sharding(layout: str) -> None:
    """Make accelerate shard on CPUs as if they were XPUs: on several CPUs, it silently ignores FSDP."""
    if layout.startswith("fsdp"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU  # noqa: SLF001  has no public setting
    if layout == "fsdp1":
        PartialState().device = torch.device("cpu")  # torch's FSDP1 refuses accelerate's cpu:0


def make_model(seed: int = 0, **settings: Any) -> LlamaForCausalLM:  # noqa: ANN401  of LlamaConfig
    """A model of two layers, with tied embeddings."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
            use_cache=False,
            **settings,
        )
    )


def make_samples(count: int, seed: int = 7) -> Samples:
    """Sequences of six random tokens."""
    tokens = torch.randint(0, 11, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Recorder(TrainerCallback):
    """Records full live weights after each step, and the metrics of each evaluation."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []

    def on_step_end(self, *_: object, model: nn.Module, **__: object) -> None:
        self.weights.append(full_tensors(model))

    def on_evaluate(self, *_: object, metrics: dict[str, float], **__: object) -> None:
        self.metrics.append(metrics)


def full_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Full copies of the tensors in the model by name, on every rank."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.detach().clone() for name, tensor in weights.items() if isinstance(tensor, Tensor)}


def make_trainer(
    layout: str,
    folder: Path,
    *callbacks: TrainerCallback,
    model: nn.Module | None = None,
    trainer_class: type[Trainer] = Trainer,
    arguments_class: type[TrainingArguments] = TrainingArguments,
    trainer_settings: dict[str, Any] | None = None,
    **settings: Any,  # noqa: ANN401  of TrainingArguments
) -> Trainer:
    """A Trainer on this rank; `settings` override the arguments below."""
    set_environment(layout)
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 3e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "seed": 17,
    }
    arguments = arguments_class(output_dir=str(folder), **defaults | FSDP_SETTINGS.get(layout, {}) | settings)
    assert arguments.device.type == "cpu"  # the first access resets accelerate's state
    allow_sharding(layout)
    given = {"train_dataset": make_samples(24), "eval_dataset": make_samples(8, seed=8)} | (trainer_settings or {})
    return trainer_class(model=model or make_model(), args=arguments, callbacks=[*callbacks], **given)


@contextmanager
def ignored_warnings() -> Iterator[None]:
    """Ignore the warnings of transformers, accelerate and torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reference_average(weights: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The oracle: the moving average of full weights in float64, from the first ones."""
    first, *rest = weights
    average = {name: live.double() for name, live in first.items()}
    for full in rest:
        average = {name: value * decay + full[name].double() * (1 - decay) for name, value in average.items()}
    return average


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """The same names, and equal tensors within the tolerance."""
    assert left.keys() == right.keys()
    for name, expected in right.items():
        torch.testing.assert_close(left[name].double(), expected.double(), rtol=tolerance, atol=tolerance, msg=name)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same names, and bit-identical tensors."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def is_first_rank() -> bool:
    """Whether full tensors are gathered on this rank."""
    return not dist.is_initialized() or dist.get_rank() == 0
