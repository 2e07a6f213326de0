"""Inside `serving` forward passes read the averages, and the live weights stay where and what they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ema_dist import HalfLife, ShardedEMA, checkpoint
from ema_dist.evaluation.serving import CAST_COPY, DIRECT, GATHERED_COPY
from ema_dist.sharding import fsdp2
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    assert_bitwise_equal,
    evaluate,
    full_weights,
    layouts,
    make_net,
    make_trained,
    peak_memory,
    train_step,
    wrap,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


SERVED = (
    *("plain", "ddp", "ddp-3", "fsdp2", "fsdp2-1", "fsdp2-3", "fsdp2-4", "fsdp2-root", "fsdp2-keep", "hsdp", "tp"),
    *("fsdp2-tp", "ddp-checkpointed", "fsdp2-checkpointed", "plain-compiled", "ddp-compiled", "fsdp2-compiled"),
    "tp-compiled",
)
"""Layouts whose averages are served without a swap."""

TAUGHT = [name for name in SERVED if name not in ("ddp-3", "fsdp2-1", "fsdp2-4", "ddp-compiled", "tp-compiled")]
"""Layouts in which gradients beside a teacher are compared: not each world size, nor each wrapper compiled."""

TENSOR_PARALLEL = ("tp", "fsdp2-tp", "tp-compiled")
"""Layouts that add up in another order than the unwrapped model."""

WRITTEN = r"serving\(\).*\bblocks\.0\..*(stats\.weight\b(?!, )|\b(?:4|12) more\b)"
"""What is said when all weights were written to: the last one is named, or how many more there are."""


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local_state(model: nn.Module) -> dict[str, Tensor]:
    """This rank's part of everything that ``state_dict()`` holds."""
    return {name: local(tensor) for name, tensor in model.state_dict().items()}


def batch(seed: int = 7) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


@layouts(*SERVED)
def test_a_forward_pass_inside_computes_with_the_averages(layout: str) -> None:
    """As the unwrapped model does that has them loaded; and before and after it as if nothing had happened."""
    model, ema = make_trained(layout)
    live = full_weights(model)
    before = evaluate(model)
    with ema.swapped():
        swapped = evaluate(model)
    for _ in range(2):
        with ema.serving() as served:
            assert served is model
            assert not torch.is_grad_enabled()
            inside = evaluate(model)
        assert torch.equal(inside, swapped)
        assert torch.equal(evaluate(model), before)
    assert not torch.equal(inside, before)
    assert_bitwise_equal(full_weights(model), live)
    if full := ema.full_state_dict():
        net = make_net(layout)
        net.load_state_dict(full)
        tolerance = 1e-5 if layout in TENSOR_PARALLEL else 0
        torch.testing.assert_close(inside, evaluate(net), rtol=tolerance, atol=tolerance)
    ema.update()


@layouts(*TAUGHT)
def test_gradients_with_a_teacher_are_bit_identical_to_those_without(layout: str) -> None:
    """Between forward and backward of a live graph, in training mode: the live statistics are the same as well."""

    def gradients(serving: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:  # noqa: FBT001
        model, ema = make_trained(layout)
        averages = ema.full_state_dict()
        for step in range(2):
            output = model(batch(step))
            if serving:
                with ema.serving():
                    model(batch(step + 2))
                    model(batch(step + 4))
            output.square().mean().backward()
        averages_after = ema.full_state_dict()
        assert_bitwise_equal(averages_after, averages)
        actual = {
            name: local(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
        }
        return actual, local_state(model), averages_after

    with_teacher, without = gradients(serving=True), gradients(serving=False)
    for actual, expected in zip(with_teacher, without, strict=True):
        assert_bitwise_equal(actual, expected)
    assert len(with_teacher[0]) == 17


@layouts("ddp", "fsdp2-3", "hsdp", "tp")
def test_training_goes_on_as_without_a_teacher(layout: str) -> None:
    def weights(serving: bool) -> dict[str, Tensor]:  # noqa: FBT001
        model, ema = make_trained(layout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for step in range(3, 6):
            if serving:
                with ema.serving():
                    model(batch(step))
            train_step(model, optimizer, step)
            ema.update()
        return local_state(model)

    assert_bitwise_equal(weights(serving=True), weights(serving=False))


@layouts("plain", "ddp", "fsdp2-3", "hsdp", "tp", "plain-compiled")
def test_state_dicts_taken_inside_hold_the_live_weights(layout: str) -> None:
    """Of the model and of a part of it, by torch's own means; the averages are served again after that."""
    model, ema = make_trained(layout)
    live, gathered = local_state(model), full_weights(model)
    part = next(module for name, module in model.named_modules() if name.endswith("blocks.1"))
    live_part = local_state(part)
    with ema.serving():
        inside = evaluate(model)
        assert_bitwise_equal(local_state(model), live)
        assert_bitwise_equal(local_state(part), live_part)
        assert_bitwise_equal(
            {name: local(tensor) for name, tensor in part.state_dict(keep_vars=True).items()}, live_part
        )
        assert_bitwise_equal(full_weights(model), gathered)
        state = get_model_state_dict(model)
        assert [name for name in gathered if name not in state] == []
        assert torch.equal(evaluate(model), inside)
    for module in model.modules():
        hooks = (module._state_dict_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks)  # noqa: SLF001
        assert [key for registry in hooks for key in registry if key == "ema_dist"] == []


@layouts("plain", "ddp", "fsdp2-3", "hsdp", "tp")
def test_the_averages_can_be_gathered_and_saved_inside(layout: str, tmp_path: Path) -> None:
    model, ema = make_trained(layout)
    optimizer = torch.optim.AdamW(model.parameters())
    full, live = ema.full_state_dict(), full_weights(model)
    with ema.serving():
        inside = evaluate(model)
        assert_bitwise_equal(ema.full_state_dict(), full)
        assert_bitwise_equal({name: value for name, value in ema.gather() if full}, full)
        ema.check_replicas()
        checkpoint.save({"model": model, "optim": optimizer, "ema": ema}, broadcast_path(tmp_path), step=1)
        assert torch.equal(evaluate(model), inside)
        with pytest.raises(RuntimeError, match=r"'model'.*serving\(\)"):
            checkpoint.load({"model": model, "optim": optimizer, "ema": ema}, broadcast_path(tmp_path))
    ema.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    checkpoint.load({"model": model, "optim": optimizer, "ema": ema}, broadcast_path(tmp_path))
    assert_bitwise_equal(full_weights(model), live)
    assert_bitwise_equal(ema.full_state_dict(), full)


def broadcast_path(folder: Path) -> Path:
    """The first rank's."""
    paths = [folder]
    dist.broadcast_object_list(paths, src=0)
    return paths[0]


@pytest.mark.parametrize("replicas", ["shard", "copy"])
@layouts("plain", "ddp", "fsdp2-3", "hsdp", "tp")
def test_narrower_live_weights_are_served_by_a_copy(layout: str, replicas: str) -> None:
    """It is what a swap would put there, and the averages keep their precision."""
    model = wrap(layout, make_net(layout).bfloat16())
    ema = ShardedEMA(model, decay=0.5, replicas=replicas)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    ema.update()
    averages = ema.full_state_dict(dtype=torch.float32)
    split = replicas == "shard" and layout in ("ddp", "hsdp", "tp")
    assert ema.serving_mode == (GATHERED_COPY if split else CAST_COPY)
    with ema.swapped():
        swapped = narrow_output(model)
    with ema.serving():
        assert torch.equal(narrow_output(model), swapped)
    assert_bitwise_equal(ema.full_state_dict(dtype=torch.float32), averages)


@torch.no_grad()
def narrow_output(model: nn.Module) -> Tensor:
    model.eval()
    return model(batch().bfloat16()).clone()


@pytest.mark.parametrize("replicas", ["shard", "copy"])
@layouts("plain", "ddp", "fsdp2-3", "hsdp", "tp")
def test_the_serving_mode_is_reported(layout: str, replicas: str) -> None:
    _, ema = make_trained(layout, replicas=replicas)
    split = replicas == "shard" and layout in ("ddp", "hsdp", "tp")
    assert ema.serving_mode == (GATHERED_COPY if split else DIRECT)
    assert f"serving_mode={ema.serving_mode})" in repr(ema)


@layouts("ddp", "hsdp")
def test_one_rank_is_served_alone_with_copies(layout: str) -> None:
    """Entering sends nothing then; DDP's own forward would, so the module inside is asked."""
    model, ema = make_trained(layout, replicas="copy")
    with ema.swapped():
        swapped = evaluate(model.module if layout == "ddp" else model)
    if layout == "hsdp" or dist.get_rank() == 0:
        with ema.serving():
            assert torch.equal(evaluate(model.module if layout == "ddp" else model), swapped)


@pytest.mark.world_size(2)
def test_one_rank_entering_alone_gets_an_error_naming_the_others() -> None:
    _, ema = make_trained("ddp", timeout=0.5)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"0\.5 s.*serving\(\).*rank 1"), ema.serving():
            pass
    dist.barrier()
    with ema.serving():
        pass


@layouts("plain", "ddp", "fsdp2-3")
def test_what_would_mix_live_weights_and_averages_is_refused(layout: str) -> None:
    model, ema = make_trained(layout)
    other = ShardedEMA(model)
    inside = pytest.raises(RuntimeError, match=r"\w\(\).*serving\(\)")
    for refused in (ema.update, ema.swapped().__enter__, ema.serving().__enter__, partial(ema.copy_to, model)):
        with ema.serving(), inside:
            refused()
    with ema.serving():
        for enter in (other.swapped().__enter__, other.serving().__enter__):
            with pytest.raises(RuntimeError, match=r"another ShardedEMA.*serving\(\)"):
                enter()
    with ema.swapped():
        with pytest.raises(RuntimeError, match=r"serving\(\).*swapped\(\)"):
            ema.serving().__enter__()
        with pytest.raises(RuntimeError, match=r"ShardedEMA.*swapped\(\)"):
            other.serving().__enter__()
    ema.update()
    with other.serving(), pytest.raises(RuntimeError, match=r"another ShardedEMA.*serving\(\)"):
        ema.swapped().__enter__()


class StumbleError(Exception):
    """Raised in the middle of a forward pass."""


@contextmanager
def stumbling(model: nn.Module) -> Iterator[None]:
    def stumble(*_: object) -> None:
        raise StumbleError

    block = next(module for name, module in model.named_modules() if name.endswith("blocks.1"))
    handle = block.register_forward_pre_hook(stumble)
    yield
    handle.remove()


@layouts("plain", "ddp", "fsdp2-3", "fsdp2-keep", "fsdp2-root", "hsdp", "tp")
def test_an_exception_inside_leaves_no_trace(layout: str) -> None:
    """Also one in the middle of a forward pass, which leaves FSDP2 with gathered averages."""

    def gradients(stumbles: bool) -> dict[str, Tensor]:  # noqa: FBT001
        model, ema = make_trained(layout)
        output = model(batch(1))
        if stumbles:
            with stumbling(model), pytest.raises(StumbleError), ema.serving():
                model(batch(2))
        output.square().mean().backward()
        model(batch(3)).square().mean().backward()
        ema.update()
        return {
            name: local(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    assert_bitwise_equal(gradients(stumbles=True), gradients(stumbles=False))


@layouts("plain", "fsdp2-1", "fsdp2-3", "hsdp", "tp")
def test_the_very_first_forward_pass_may_be_inside(layout: str) -> None:
    """FSDP2 arranges its shards anew when it first runs."""
    model = wrap(layout, make_net(layout))
    ema = ShardedEMA(model)
    averages = ema.full_state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    live = full_weights(model)
    with ema.serving():
        inside = evaluate(model)
    assert_bitwise_equal(full_weights(model), live)
    assert_bitwise_equal(ema.full_state_dict(), averages)
    torch.testing.assert_close(inside, evaluate(make_net(layout)), rtol=1e-5, atol=1e-5)
    train_step(model, optimizer, 0)
    assert not torch.equal(evaluate(model), inside)


def gathered_early(net: nn.Module) -> nn.Module:
    return fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), reshard_after_forward=False)


def in_smaller_groups(net: nn.Module) -> nn.Module:
    """After a forward pass, weights stay gathered in halves of the world."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=2)
    return fully_shard(net, mesh=mesh, reshard_after_forward=2)


def in_bfloat16(net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    wide = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.bfloat16)
    fully_shard(net.stats, mesh=mesh, mp_policy=wide)  # its buffers are
    return fully_shard(net, mesh=mesh, mp_policy=policy)


def offloaded(net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return fully_shard(net, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))


def two_at_once(net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard([*net.blocks], mesh=mesh)
    return fully_shard(net, mesh=mesh)


@pytest.mark.world_size(4)
@pytest.mark.parametrize("shard", [gathered_early, in_smaller_groups, in_bfloat16, offloaded, two_at_once])
def test_every_way_to_use_fsdp2(shard: Callable[[nn.Module], nn.Module]) -> None:
    def run(serving: bool) -> tuple[dict[str, Tensor], list[Tensor]]:  # noqa: FBT001
        model = shard(make_net("fsdp2"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        ema = ShardedEMA(model, decay=0.8)
        outputs: list[Tensor] = []
        for step in range(3):
            output = model(batch(step))
            with ema.serving() if serving else nullcontext():
                outputs += [model(batch(9)).clone()] if serving else []
            output.square().mean().backward()
            if not serving:
                with ema.swapped(), torch.no_grad():
                    outputs.append(model(batch(9)).clone())
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
        return {name: tensor for name, tensor in local_state(model).items() if "stats.num" not in name}, outputs

    (served, inside), (expected, swapped) = run(serving=True), run(serving=False)
    trainable = [name for name in expected if not name.startswith("stats.running")]
    assert_bitwise_equal({name: served[name] for name in trainable}, {name: expected[name] for name in trainable})
    for actual, wanted in zip(inside, swapped, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.world_size(2)
def test_prefetched_all_gathers_are_not_used_for_averages() -> None:
    """Where the next forward pass would wait for an all-gather that has begun, and compute with that."""
    model, ema = make_trained("fsdp2")
    before = evaluate(model)
    with ema.serving():
        expected = evaluate(model)
    for module in (model, *model.blocks):
        module.unshard(async_op=True)
    with ema.serving():
        assert torch.equal(evaluate(model), expected)
        for module in (model, *model.blocks):
            module.unshard(async_op=True)
    assert torch.equal(evaluate(model), before)


@layouts("plain", "ddp", "tp")
def test_backward_of_an_older_graph_inside_is_an_error_after_the_block(layout: str) -> None:
    """Its gradients are right here, where nothing is computed anew; but the same code is wrong elsewhere."""
    model, ema = make_trained(layout)
    model(batch()).sum().backward()
    expected = {
        name: local(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    for set_to_none in (True, False):
        model.zero_grad(set_to_none=set_to_none)
        output = model(batch()).sum()
        message = r"backward\(\).*serving\(\).*\bembed\.weight, blocks\.0\."
        with pytest.raises(RuntimeError, match=message), ema.serving():
            output.backward()
        actual = {
            name: local(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
        }
        assert_bitwise_equal(actual, expected)
    with ema.serving():
        model.zero_grad()


@layouts("fsdp2-3", "hsdp", "fsdp2-tp")
def test_gradients_inside_are_refused_where_they_would_mix(layout: str) -> None:
    """FSDP2 gathers weights for backward; and afterwards everything goes on as if nothing had been asked."""
    model, ema = make_trained(layout)
    output = model(batch()).sum()
    with ema.serving():
        with pytest.raises(RuntimeError, match=r"backward\(\).*serving\(\).*FSDP2"):
            output.backward(retain_graph=True)
        with (
            pytest.raises(RuntimeError, match=r"serving\(\).*torch\.enable_grad\(\).*swapped\(\)"),
            torch.enable_grad(),
        ):
            model(batch())
    model.zero_grad()
    model(batch()).sum().backward()
    actual = {name: local(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None}
    model, _ = make_trained(layout)
    model(batch()).sum()
    model(batch()).sum().backward()
    expected = {
        name: local(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert_bitwise_equal(actual, expected)


@layouts("ddp-checkpointed", "tp-checkpointed")
def test_recomputing_an_older_forward_pass_inside_is_an_error(layout: str) -> None:
    """Activation checkpointing would compute it again from averages; torch notices most of that, and we the rest."""
    model, ema = make_trained(layout)
    output = model(batch()).sum()
    message = r"backward\(\).*serving\(\)"
    noticed = pytest.raises(torch.utils.checkpoint.CheckpointError)
    with pytest.raises(RuntimeError, match=message), ema.serving(), noticed:
        output.backward()


@layouts("plain", "ddp", "fsdp2-3", "tp")
def test_loading_weights_inside_is_refused(layout: str) -> None:
    model, ema = make_trained(layout)
    live, averages = full_weights(model), ema.full_state_dict()
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    with ema.serving(), pytest.raises(RuntimeError, match=r"load_state_dict\(\).*serving\(\)"):
        model.load_state_dict(state)
    assert_bitwise_equal(full_weights(model), live)
    assert_bitwise_equal(ema.full_state_dict(), averages)
    model.load_state_dict(state)
    assert not any(value.any() for value in full_weights(model).values())


@pytest.mark.world_size(2)
def test_loading_inside_serving_is_refused_under_fsdp2() -> None:
    """Under FSDP2, which would gather the loaded ones from then on."""
    model = fully_shard(nn.Linear(7, 7), mesh=init_device_mesh("cpu", (2,)))
    ema = ShardedEMA(model)
    with ema.serving(), pytest.raises(RuntimeError, match=r"load_state_dict\(\).*serving\(\)"):
        model.load_state_dict(model.state_dict())


@pytest.mark.world_size(2)
def test_serving_in_the_middle_of_a_forward_pass_is_refused_where_weights_are_in_use() -> None:
    model, ema = make_trained("fsdp2")

    def serve(*_: object) -> None:
        with ema.serving():
            pass

    handle = model.stats.register_forward_pre_hook(serve)
    with pytest.raises(ValueError, match=r"FSDP2.*forward.*backward"):
        model(batch())
    handle.remove()
    model(batch())
    serve()


@layouts("plain", "ddp", "tp")
def test_writing_parameters_inside_is_an_error(layout: str) -> None:
    """What modules show there are averages, if nothing was copied."""
    model, ema = make_trained(layout, replicas="copy")
    live = full_weights(model)
    with pytest.raises(RuntimeError, match=WRITTEN), ema.serving():
        for name, parameter in model.named_parameters():
            if "frozen" not in name:
                parameter.add_(1)
    assert_bitwise_equal(full_weights(model), live)


@layouts("plain", "fsdp2")
def test_casting_the_model_inside_is_an_error(layout: str) -> None:
    """The averages are not cast, and are served as before."""
    model, ema = make_trained(layout)
    averages = averaged(ema)
    with pytest.raises(RuntimeError, match=WRITTEN), ema.serving():
        model.to(torch.bfloat16)
    model.to(torch.float32)
    assert_bitwise_equal(averaged(ema), averages)
    with ema.swapped():
        swapped = evaluate(model)
    with ema.serving():
        assert torch.equal(evaluate(model), swapped)


def averaged(ema: ShardedEMA) -> dict[str, Tensor]:
    return {name: value for name, value in ema.full_state_dict().items() if "frozen" not in name}


def test_replacing_a_parameter_inside_is_an_error() -> None:
    model, ema = make_trained("plain")
    weight = model.embed.weight
    with pytest.raises(RuntimeError, match=r"serving\(\)[^,]*\bembed\.weight\b(?!, )"), ema.serving():
        model.embed.weight = nn.Parameter(torch.zeros(5, 6))
    assert model.embed.weight is weight


def test_modules_that_keep_their_weights_in_a_list_are_served() -> None:
    """Recurrent ones do."""
    torch.manual_seed(0)
    model = nn.LSTM(6, 5, num_layers=2)
    ema = ShardedEMA(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    ema.update()
    parameters = [*model.parameters()]
    with torch.no_grad():
        before = model(batch())[0]
        with ema.swapped():
            swapped = model(batch())[0]
        with ema.serving():
            assert torch.equal(model(batch())[0], swapped)
        assert torch.equal(model(batch())[0], before)
    assert all(now is original for now, original in zip(model.parameters(), parameters, strict=True))


def test_gradients_reach_the_inputs_through_averages() -> None:
    """Perceptual losses, forces: what is computed inside with gradients knows no gradient of the averages."""
    model, ema = make_trained("plain")
    inputs = batch().requires_grad_()
    with ema.serving(), torch.enable_grad():
        model.eval()
        output = model(inputs).sum()
    output.backward()
    with ema.swapped():
        inputs_after = batch().requires_grad_()
        model(inputs_after).sum().backward()
    assert torch.equal(inputs.grad, inputs_after.grad)


@layouts("fsdp1", "fsdp1-flat", "fsdp1-no-shard")
def test_fsdp1_falls_back_to_swapping_with_one_warning(layout: str) -> None:
    model, ema = make_trained(layout, decay=HalfLife(0.75))  # old enough for no other warning
    with ema.swapped():
        swapped = evaluate(model)
    assert ema.serving_mode == "swapped(), since FSDP1 computes with views of its flat parameters"
    with (
        pytest.warns(UserWarning, match=r"serving\(\).*FSDP1") as caught,
        ema.serving(),
    ):
        assert torch.equal(evaluate(model), swapped)
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    with ema.serving():
        pass


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings(r"ignore:.*serving\(\).*averages:UserWarning")
def test_a_torch_without_the_fsdp2_internals_falls_back_to_swapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp2, "GROUP_ATTRIBUTES", ("fsdp_params", "_hidden"))
    model, ema = make_trained("fsdp2")
    assert "['_hidden']" in ema.serving_mode
    with ema.swapped():
        swapped = evaluate(model)
    with ema.serving():
        assert torch.equal(evaluate(model), swapped)


@pytest.mark.filterwarnings(r"ignore:.*serving\(\).*averages:UserWarning")
def test_a_module_replaying_a_cuda_graph_falls_back_to_swapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was captured after averages had been served."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    model, ema = make_trained("plain")
    with ema.serving():
        inside = evaluate(model)
    forward = model.blocks[0].forward

    def replay(x: Tensor) -> Tensor:
        return forward(x)

    replay.__module__ = "torch.cuda.graphs"
    model.blocks[0].forward = replay
    assert "CUDA graph" in ema.serving_mode
    with ema.serving():
        assert torch.equal(evaluate(model), inside)


@layouts("plain", "fsdp2-3", "tp")
def test_full_averages_in_the_live_dtype_are_served_without_copies(layout: str) -> None:
    """Uneven shards included: an average has room for the padding that FSDP2 gathers."""
    _, ema = make_trained(layout, replicas="copy")

    def serve() -> None:
        with ema.serving():
            pass

    serve()
    assert peak_memory(serve) == 0


@pytest.mark.world_size(1)
@pytest.mark.parametrize("shards", [False, True], ids=["plain", "fsdp2"])
def test_entering_and_leaving_takes_few_calls_for_each_tensor(shards: bool) -> None:  # noqa: FBT001
    """Of Python and C functions: times depend on what else the machine does. Reading the model anew takes 100."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(500)))
    if shards:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    ema = ShardedEMA(model)
    nn.init.ones_(model[0].weight)
    ema.update()  # as in training: before the first write, writes are looked for
    calls: list[str] = []

    def serve() -> None:
        with ema.serving():
            pass

    serve()
    sys.setprofile(lambda _frame, event, _argument: calls.append(event))
    serve()
    sys.setprofile(None)
    assert len([event for event in calls if event in ("call", "c_call")]) <= 5 * 1000
