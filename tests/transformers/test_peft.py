"""PEFT in the Trainer: averages of the adapters alone, exported as an adapter folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers: tox -e frameworks")
pytest.importorskip("peft", reason="needs peft: tox -e frameworks")

import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

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
    make_trainer,
    reference_average,
    trainer_layouts,
)

DECAY = 0.8
SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}

pytestmark = [
    IGNORE_INITIAL_WEIGHTS_WARNING,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's own use
]


def make_adapted(seed: int = 0) -> torch.nn.Module:
    """The same base model, with adapters of this seed."""
    base = make_model()
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian", task_type=TaskType.CAUSAL_LM
    )
    return get_peft_model(base, config)


def adapters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those under the names of an adapter file."""
    return {name.replace(".default", ""): tensor for name, tensor in weights.items() if "lora" in name}


@trainer_layouts()
def test_averages_of_adapters(layout: str, tmp_path: Path) -> None:
    """They alone are averaged, a resumed run is bit-identical, and `from_pretrained` loads what is exported."""
    recorder = Recorder()
    trainer = make_trainer(layout, tmp_path, recorder, model=make_adapted(), load_best_model_at_end=True, **SAVES)
    initial = full_tensors(trainer.model)
    callback = EMACallback(decay=DECAY).bind(trainer)
    with ignored_warnings():
        trainer.train()
    assert callback.ema is not None
    tracks = callback.ema.state_dict()["tracks"]["default"]
    assert {*tracks["averages"], *tracks["buffers"]} == {name for name in initial if "lora" in name}
    averages = adapters(callback.ema.full_state_dict())
    best = trainer.state.best_global_step
    if is_first_rank():
        assert_close(averages, adapters(reference_average([initial, *recorder.weights[:best]], DECAY)))

    callback.save_pretrained(tmp_path / "adapter")
    trainer.save_model(str(tmp_path / "saved"))
    metric = trainer.evaluate()["eval_loss"]
    assert metric == recorder.metrics[best // 4 - 1]["eval_loss"]
    if is_first_rank():
        for folder in (tmp_path / "adapter", tmp_path / "saved"):
            assert not [*folder.glob("model*")]
            assert_same(load_file(folder / "adapter_model.safetensors"), averages)
            loaded = PeftModel.from_pretrained(make_model(), folder)
            assert_same(get_peft_model_state_dict(loaded), averages)

    resumed_recorder = Recorder()
    resumed = make_trainer(layout, tmp_path, resumed_recorder, model=make_adapted(seed=1), **SAVES)
    resumed_callback = EMACallback(decay=DECAY).bind(resumed)
    with ignored_warnings():
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for weights, same in zip(resumed_recorder.weights, recorder.weights[4:], strict=True):
        assert_same(weights, same)
    assert resumed_callback.ema is not None
    resumed_averages = adapters(resumed_callback.ema.full_state_dict())
    if is_first_rank():
        assert_close(resumed_averages, adapters(reference_average([initial, *recorder.weights], DECAY)))


@trainer_layouts("ddp")
def test_prompts_are_exported_although_peft_reads_them_from_the_model(layout: str, tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, task_type=TaskType.CAUSAL_LM)
    trainer = make_trainer(layout, tmp_path, model=get_peft_model(make_model(), config))
    callback = EMACallback(decay=DECAY).bind(trainer)
    trainer.train()
    assert callback.ema is not None
    averages = callback.ema.full_state_dict()
    callback.save_pretrained(tmp_path / "adapter")
    if is_first_rank():
        (prompt,) = [tensor for name, tensor in averages.items() if "prompt" in name]
        assert_same(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), {"prompt_embeddings": prompt})
