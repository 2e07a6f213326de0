"""Wrong use gets an error that says what was expected, found and to be done, and loses nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ema_dist import Offloaded, ShardedEMA, checkpoint, compute_ema
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    assert_bitwise_equal,
    full_weights,
    layouts,
    make_net,
    make_trained,
    wrap,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.5}, r"decay.*\[0, 1\].*1\.5"),
        ({"decay": -0.1}, r"decay.*\[0, 1\].*-0\.1"),
        ({"decay": float("nan")}, r"decay.*\[0, 1\].*\bnan\b"),
        ({"decay": 1000}, r"decay.*\b1000\b.*HalfLife\(steps\)"),
        ({"start": -1}, r"start\b.*-1\b"),
        ({"update_interval": 0}, r"update_interval.*\b1\b.*\b0\b"),
        ({"dtype": torch.int32}, r"floating-point.*\b16\b.*dtype=torch\.int32"),
        ({"replicas": "all"}, r"replicas.*shard.*copy.*'all'"),
        ({"buffers": "mean"}, r"buffers.*average.*copy.*'mean'"),
        ({"select": lambda _name, _parameter: False}, r"\b2 parameters.*\bselect\("),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedEMA(nn.Linear(2, 2), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bfloat16"}, r"dtype must be a torch\.dtype.*torch\.bfloat16.*'bfloat16'"),
        ({"start": "100ba"}, r"start must be a number.*'100ba'"),
        ({"update_interval": 1.5}, r"update_interval must be an integer.*\b1\.5\b"),
        ({"select": ["weight"]}, r"select must be a function.*\['weight'\]"),
        ({"decay": "0.999"}, r"decay must be a number.*'0\.999'"),
    ],
)
def test_a_setting_of_another_type_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ShardedEMA(nn.Linear(2, 2), **settings)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected the model.*torch\.nn\.Module.*\bgenerator\b"):
        ShardedEMA(nn.Linear(2, 2).parameters())


@pytest.mark.parametrize("decay", [0.001, 0, 1, 1.0, {"a": 0.999, "b": 0.1}])
def test_a_decay_that_looks_like_the_weight_of_the_live_values_warns(decay: Any) -> None:  # noqa: ANN401
    with pytest.warns(UserWarning, match=r"decay=.*factor of the old average.*HalfLife") as caught:
        ShardedEMA(nn.Linear(2, 2), decay=decay)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_module_is_not_what_a_checkpoint_holds(tmp_path: Path) -> None:
    for call in (partial(checkpoint.save, step=1), checkpoint.load):
        with pytest.raises(TypeError, match=r"expected a dictionary.*\{'model': model\}.*\bLinear\b"):
            call(nn.Linear(2, 2), tmp_path)


def test_selecting_an_integer_parameter_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"\bselect\b.*\bcodes\b.*floating-point"):
        ShardedEMA(model, select=lambda _name, _parameter: True)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\b2 parameters.*grad"):
        ShardedEMA(nn.Linear(2, 2).requires_grad_(requires_grad=False))


@layouts("plain", "fsdp2")
def test_a_model_on_meta_is_refused(layout: str) -> None:
    with pytest.raises(ValueError, match=r"'mask'.*\bmeta device"):
        ShardedEMA(wrap(layout, make_net(layout).to("meta")))


def test_a_message_names_the_first_of_many() -> None:
    """What to do about it must not be lost behind a thousand names."""
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(12)))
    ema = ShardedEMA(model)
    match = r"swapped\(\).*\b0\.weight, 1\.weight, .*, 4\.weight\D*\b7 more\b.*checkpoint"
    with pytest.raises(RuntimeError, match=match), torch.no_grad(), ema.swapped():
        for parameter in model.parameters():
            parameter.zero_()


@pytest.mark.parametrize("store", [None, Offloaded()], ids=str)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_and_says_what_to_do(copied: Callable[[ShardedEMA], object], store: Offloaded | None) -> None:
    ema = ShardedEMA(nn.Linear(1, 1), store=store)
    with pytest.raises(TypeError, match=r"ShardedEMA.*\bconsolidated_state_dict\(\)"):
        copied(ema)


@layouts("plain", "ddp", "fsdp1", "fsdp2")
def test_a_parameter_that_became_trainable_is_named(layout: str) -> None:
    """It would ship untracked."""
    model, ema = make_trained(layout)
    for name, parameter in model.named_parameters():
        if "frozen" in name:
            parameter.requires_grad_()
    with pytest.raises(ValueError, match=r"frozen\.weight, frozen\.bias.*trainable"), ema.swapped():
        pass
    with pytest.raises(ValueError, match=r"frozen\.weight, frozen\.bias.*trainable"):
        ema.full_state_dict()
    with pytest.raises(ValueError, match=r"frozen\.weight, frozen\.bias.*trainable"):
        ema.state_dict()


@pytest.mark.world_size(2)
def test_calls_after_the_process_group_is_gone() -> None:
    _, ema = make_trained("ddp")
    dist.barrier()
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match=r"swapped\(\).*ranks 0-1.*destroy_process_group\(\)"), ema.swapped():
        pass
    with pytest.raises(RuntimeError, match=r"full_state_dict\(\).*ranks 0-1.*destroy_process_group\(\)"):
        ema.full_state_dict()
    ema.update()


@layouts("fsdp1", "fsdp2")
def test_gathering_on_rank_0_alone_is_an_error_within_the_timeout(layout: str) -> None:
    _, ema = make_trained(layout, timeout=0.5)
    if dist.get_rank() == 0:
        for call in (ema.full_state_dict, ema.state_dict, lambda: ema.load_full_state_dict({})):
            with pytest.raises(RuntimeError, match=r"0\.5 s.*rank 1"):
                call()
    dist.barrier()
    ema.full_state_dict()


def test_compute_ema_refuses_models_that_differ() -> None:
    with pytest.raises(ValueError, match=r"shapes.*\bweight:"):
        compute_ema(nn.Linear(2, 2), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"\[0, 1\].*\b2\b"):
        compute_ema(nn.Linear(2, 2), nn.Linear(2, 2), smoothing=2)


def test_copying_to_another_model_is_refused() -> None:
    _, ema = make_trained("plain")
    other = make_net("plain", seed=1)
    other.blocks[0].out = nn.Linear(7, 5)
    before = full_weights(other)
    with pytest.raises(ValueError, match=r"shapes.*\bblocks\.0\.out\.weight, blocks\.0\.out\.bias$"):
        ema.copy_to(other)
    assert_bitwise_equal(full_weights(other), before)
    with pytest.raises(ValueError, match="stranger"):
        ema.copy_to(nn.ModuleDict({"stranger": nn.Linear(2, 2)}))


@pytest.mark.parametrize(("old", "new"), [("moves_by", "update_kernel"), ("serves_by", "serving_mode")])
def test_a_renamed_property_works_and_names_the_new_one(old: str, new: str) -> None:
    ema = ShardedEMA(nn.Linear(2, 2))
    with pytest.warns(DeprecationWarning, match=rf"ShardedEMA\.{old}\b.*ShardedEMA\.{new}\b") as caught:
        value = getattr(ema, old)
    assert value == getattr(ema, new)
    assert [warning.filename for warning in caught] == [__file__]
