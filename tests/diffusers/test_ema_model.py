"""`ema_dist.diffusers.EMAModel` beside diffusers' own: the same numbers, methods and files, on real ranks."""

from __future__ import annotations

import copy
import inspect
import runpy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("diffusers", reason="needs diffusers: tox -e frameworks")

import torch
import torch.distributed as dist
from diffusers import training_utils
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from ema_dist.diffusers import EMAModel
from tests.support import ROOT
from tests.support.layouts import Net, full_weights, layouts, make_net, train_step, wrap

pytestmark = pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained:FutureWarning")  # diffusers' own

SETTINGS: list[dict[str, Any]] = [
    {"decay": 0.6},
    {"decay": 0.6, "min_decay": 0.3, "update_after_step": 2},
    {"decay": 0.8, "use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75, "update_after_step": 1},
    {"decay": 0.9, "use_ema_warmup": True, "min_decay": 0.4, "foreach": True},
]
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    """The same number of tensors, equal within float32 rounding."""
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach().float(), rtol=1e-5, atol=1e-6)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """The same number of tensors, bit-identical."""
    assert len(actual) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


def change_weights(model: nn.Module, seed: int) -> None:
    """Changes the trainable parameters, sharded or not, by an amount that depends on the seed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5).add_((seed * 7) % 5 - 2)


def make_unet(seed: int = 0) -> UNet2DModel:
    """A tiny UNet with a frozen layer."""
    torch.manual_seed(seed)
    unet = UNet2DModel(**UNET)
    unet.conv_in.requires_grad_(requires_grad=False)
    return unet


@layouts("plain", "ddp", "fsdp1", "fsdp2")
def test_step_by_step_the_averages_of_diffusers(layout: str) -> None:
    """The model is wrapped after construction, except in FSDP1, as scripts do; it has tied and frozen weights."""
    for settings in SETTINGS:
        net = make_net(layout)
        reference = copy.deepcopy(net)
        model = wrap(layout, net) if layout == "fsdp1" else net
        ema = EMAModel(model, **settings)
        model = model if layout == "fsdp1" else wrap(layout, net)
        theirs = training_utils.EMAModel(reference.parameters(), **settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        assert ema.ema is ema.cur_decay_value is None
        for step in range(6):
            train_step(model, optimizer, step)
            reference.load_state_dict(full_weights(model))
            ema.step(model.parameters())
            theirs.step(reference.parameters())
            assert_close(ema.shadow_params, theirs.shadow_params)
            assert ema.cur_decay_value == pytest.approx(theirs.cur_decay_value, abs=1e-12)
            assert ema.ema is not None
            assert ema.ema.metrics()["ema/default/decay"] == pytest.approx(theirs.cur_decay_value, abs=1e-12)
            assert ema.optimization_step == theirs.optimization_step

        live = full_weights(model)
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        averaged = make_net(layout)
        averaged.load_state_dict(full_weights(model))
        assert_close([*averaged.parameters()], theirs.shadow_params)
        ema.restore(model.parameters())
        assert all(torch.equal(value, live[name]) for name, value in full_weights(model).items())

        ema.copy_to(reference.parameters())  # an unwrapped model gets the full averages on every rank
        assert_close([*reference.parameters()], theirs.shadow_params)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("wrapped", ["before", "after"])
def test_the_main_process_works_alone_under_ddp(wrapped: str, tmp_path: Path) -> None:
    unet = make_unet()
    model = nn.parallel.DistributedDataParallel(unet) if wrapped == "before" else unet
    config = {"model_cls": UNet2DModel, "model_config": unet.config}
    ema = EMAModel(model, decay=0.5, timeout=2, **config)
    model = model if wrapped == "before" else nn.parallel.DistributedDataParallel(unet)
    for step in range(3):
        change_weights(model, step)
        ema.step(model.parameters())
    live = [parameter.detach().clone() for parameter in unet.parameters()]
    if dist.get_rank() == 0:
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
        ema.save_pretrained(tmp_path)  # also while the averages are in the model
        assert_same([*UNet2DModel.from_pretrained(tmp_path).parameters()], ema.shadow_params)
        assert_same([parameter.detach() for parameter in unet.parameters()], ema.shadow_params)
        ema.restore(unet.parameters())
    assert_same([parameter.detach() for parameter in unet.parameters()], live)
    ema.step(model.parameters())  # all ranks go on


@pytest.mark.world_size(2)
def test_a_sharded_model_is_saved_and_loaded(tmp_path: Path) -> None:
    """FSDP2 replaces parameters; the first rank writes; what continues from the folder is bit-identical."""

    def start() -> tuple[UNet2DModel, EMAModel]:
        unet = make_unet()
        ema = EMAModel(unet, decay=0.7, use_ema_warmup=True, model_cls=UNet2DModel, model_config=unet.config)
        fully_shard(unet)
        return unet, ema

    unet, ema = start()
    resumed_unet, resumed = start()
    for step in range(6):
        if step == 3:
            ema.save_pretrained(tmp_path)
            dist.barrier()
            resumed_unet.load_state_dict(unet.state_dict())
            resumed.load_state_dict(EMAModel.from_pretrained(tmp_path, UNet2DModel).state_dict())
            assert resumed.optimization_step == 3
        change_weights(unet, step)
        ema.step(unet.parameters())
        if step >= 3:
            change_weights(resumed_unet, step)
            resumed.step(resumed_unet.parameters())
            assert resumed.cur_decay_value == ema.cur_decay_value
    assert_same(resumed.shadow_params, ema.shadow_params)
    assert resumed.ema is not None
    assert resumed.ema.initial_mass() == 0


@pytest.mark.world_size(2)
@pytest.mark.parametrize("steps", [0, 1])
def test_one_rank_of_a_sharded_model_does_not_wait_for_ever(steps: int, tmp_path: Path) -> None:
    unet = make_unet()
    ema = EMAModel(unet, model_cls=UNet2DModel, model_config=unet.config, timeout=1)
    fully_shard(unet)
    for _ in range(steps):
        ema.step(unet.parameters())
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"save_pretrained\(\)"):
            ema.save_pretrained(tmp_path)
    dist.barrier()


@pytest.mark.parametrize("through", ["folder", "state"])
@pytest.mark.parametrize("settings", SETTINGS[1:3], ids=["bounded", "warm-up"])
def test_diffusers_and_this_class_continue_from_each_other(
    through: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    classes = (EMAModel, training_utils.EMAModel)

    def make(kind: Any, model: UNet2DModel, **settings: Any) -> Any:  # noqa: ANN401  one of two unrelated classes
        return kind(model if kind is EMAModel else model.parameters(), **settings)

    for writer, reader in (classes, classes[::-1]):
        unet = make_unet()
        saved = make(writer, unet, model_cls=UNet2DModel, model_config=unet.config, **settings)
        for step in range(4):
            change_weights(unet, step)
            saved.step(unet.parameters())
        folder = tmp_path / writer.__module__
        saved.save_pretrained(folder)
        loaded = make(reader, unet)  # its settings are those of the folder or the state
        state = reader.from_pretrained(folder, UNet2DModel).state_dict() if through == "folder" else saved.state_dict()
        loaded.load_state_dict(state)
        for step in range(4, 8):
            assert {name: value for name, value in loaded.state_dict().items() if name != "shadow_params"} == {
                name: value for name, value in saved.state_dict().items() if name != "shadow_params"
            }
            assert_close(loaded.shadow_params, saved.shadow_params)
            change_weights(unet, step)
            saved.step(unet.parameters())
            loaded.step(unet.parameters())
            assert loaded.cur_decay_value == pytest.approx(saved.cur_decay_value, abs=1e-12)


def test_before_the_first_step_the_averages_are_the_weights_or_what_was_loaded(tmp_path: Path) -> None:
    unet, other = make_unet(seed=1), make_unet(seed=2)
    ema = EMAModel(unet, model_cls=UNet2DModel, model_config=unet.config)
    weights = [parameter.detach().clone() for parameter in unet.parameters()]
    assert_same(ema.shadow_params, weights)
    ema.load_state_dict(training_utils.EMAModel(other.parameters(), decay=0.25).state_dict())
    assert ema.decay == 0.25
    ema.save_pretrained(tmp_path)
    assert_same([*UNet2DModel.from_pretrained(tmp_path).parameters()], [*other.parameters()])
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    assert_same([*unet.parameters()], [*other.parameters()])
    ema.restore(unet.parameters())
    assert_same([*unet.parameters()], weights)


def test_bfloat16_weights_have_float32_averages(tmp_path: Path) -> None:
    unet = make_unet().to(torch.bfloat16)
    reference = make_unet()
    reference.load_state_dict(unet.state_dict())
    ema = EMAModel(unet, decay=0.9, model_cls=UNet2DModel, model_config=unet.config)
    theirs = training_utils.EMAModel(reference.parameters(), decay=0.9)
    for step in range(4):
        change_weights(unet, step)
        reference.load_state_dict(unet.state_dict())
        ema.step(unet.parameters())
        theirs.step(reference.parameters())
    ema.save_pretrained(tmp_path)
    for averages in (ema.shadow_params, [*UNet2DModel.from_pretrained(tmp_path).parameters()]):
        assert_close(averages, theirs.shadow_params)


@pytest.mark.world_size(1)
def test_averages_in_cpu_memory_are_those_of_diffusers() -> None:
    unet = make_unet()
    ema, theirs = EMAModel(unet, decay=0.9), training_utils.EMAModel(unet.parameters(), decay=0.9)
    ema.pin_memory()
    for step in range(4):
        change_weights(unet, step)
        ema.step(unet.parameters())
        theirs.step(unet.parameters())
    assert ema.ema is not None
    assert "Offloaded" in repr(ema.ema)
    assert_close(ema.shadow_params, theirs.shadow_params)


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    net, other = Net(), Net()
    with pytest.raises(TypeError, match=r"generator.*EMAModel\(unet"):
        EMAModel(net.parameters())  # pyrefly: ignore[bad-argument-type]
    for settings in ({"decay": 2}, {"decay": 0.5, "min_decay": 0.6}, {"update_after_step": -1}, {"power": 0}):
        with pytest.raises(ValueError, match="|".join(settings)):
            EMAModel(net, **settings)
    ema = EMAModel(net)
    count = len([*net.parameters()])
    for method in (ema.step, ema.store):
        with pytest.raises(ValueError, match=rf"{method.__name__}.*{count}.*{count}.*\b0\b"):
            method(other.parameters())
    with pytest.raises(RuntimeError, match="store"):
        ema.restore(net.parameters())
    with pytest.raises(ValueError, match="model_cls"):
        ema.save_pretrained(tmp_path)
    for parameters, data in ((other.blocks.parameters(), "expected"), (nn.Linear(2, 2).parameters(), f"{count}.*2")):
        with pytest.raises(ValueError, match=data):
            ema.copy_to(parameters)
    for state, data in (
        ({"shadow_params": [torch.zeros(1)]}, rf"{count}.*\b1\b"),
        ({"shadow_params": [torch.zeros(1)] * count}, "number 0"),
        ({"optimization_step": "3"}, "optimization_step.*'3'"),
        ({"decay": 2}, "decay"),
    ):
        with pytest.raises(ValueError, match=data):
            ema.load_state_dict(state)
    assert (ema.decay, ema.optimization_step) == (0.9999, 0)
    ema.step(net.parameters())
    for late in (ema.pin_memory, lambda: ema.to(dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="first step"):
            late()
    ema.to("cpu", dtype=torch.float32)  # what they are
    net.embed.weight = nn.Parameter(torch.zeros(5, 6))  # as rebuilding the model does
    with pytest.raises(ValueError, match=r"embed\.weight.*\(5, 6\)"):
        ema.step(net.parameters())


def test_without_diffusers_the_import_says_what_to_install() -> None:
    with mock.patch("importlib.util.find_spec", return_value=None):
        with pytest.raises(ModuleNotFoundError, match=r"pip install.*diffusers") as raised:
            runpy.run_path(str(ROOT / "ema_dist" / "diffusers" / "__init__.py"))
        assert raised.value.name == "diffusers"


def test_deepspeed_zero3_is_refused() -> None:
    net = Net()
    ema = EMAModel(net)
    net.embed.weight.ds_id = 7  # as DeepSpeed marks a partitioned parameter
    with pytest.raises(ValueError, match="ZeRO-3"):
        ema.step(net.parameters())


@pytest.mark.world_size(2)
def test_a_model_that_is_wrapped_after_the_first_step_is_refused() -> None:
    net = make_net("fsdp2")
    ema = EMAModel(net)
    ema.step(net.parameters())
    wrap("fsdp2", net)
    with pytest.raises(ValueError, match=r"blocks\.0\.module\.bias.*full tensor.*Shard"):
        ema.step(net.parameters())


def test_the_arguments_and_defaults_are_those_of_diffusers() -> None:
    """`device` and the deprecated ones, which go to ``**kwargs`` there, are left out."""
    theirs = inspect.signature(training_utils.EMAModel).parameters
    ours = inspect.signature(EMAModel).parameters
    assert next(iter(ours)) == "model"
    shared = [name for name in theirs if name in ours]
    assert [name for name in ours if ours[name].kind is not inspect.Parameter.KEYWORD_ONLY][1:] == shared
    assert [ours[name].default for name in shared] == [theirs[name].default for name in shared]


@pytest.mark.world_size(1)
def test_parameters_frozen_during_a_run_are_copied_as_by_diffusers() -> None:
    net = make_net("plain")
    ours, theirs = EMAModel(net, decay=0.5), training_utils.EMAModel(net.parameters(), decay=0.5)

    def train() -> None:
        for _ in range(3):
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(torch.randn_like(parameter))
            ours.step(net)  # the model itself, as diffusers takes it too
            theirs.step(net.parameters())

    train()
    frozen = next(parameter for parameter in net.parameters() if parameter.requires_grad)
    state = ours.state_dict()
    frozen.requires_grad_(False)  # noqa: FBT003
    with pytest.raises(ValueError, match=r"frozen or unfrozen.*load_state_dict"):
        ours.step(net.parameters())
    ours.load_state_dict(state)
    train()
    for mine, other in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="expected tensors, found a int"):
        ours.load_state_dict({"shadow_params": [1] * len(state["shadow_params"])})


@layouts("fsdp1")
def test_a_model_that_fsdp1_flattens_later_is_refused(layout: str) -> None:
    """The module given is then inside the FSDP1 module, and its parameters are parts of a flat one."""
    net = make_net(layout)
    ema = EMAModel(net)
    model = wrap(layout, net)
    with pytest.raises(ValueError, match=r"embed\.weight.*FullyShardedDataParallel"):
        ema.step(model.parameters())
