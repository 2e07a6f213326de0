"""Tensors that share memory: one tensor with several names, an error that names both, or separate tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.nn.parallel import DistributedDataParallel

from ema_dist import ShardedEMA, checkpoint, compute_ema
from ema_dist.sharding import Layout
from ema_dist.sharding.memory import Extent, overlaps, overlaps_itself
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


class TwoNames(nn.Module):
    """A weight under two names, `embed.weight` and `head.weight`; more elements than a swap's scratch on the CPU."""

    def __init__(self, rows: int = 300_000) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(2, rows, bias=False)
        self.scale = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(2, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale) + self.embed(x)


def by_identity(rows: int = 300_000) -> nn.Module:
    model = TwoNames(rows)
    model.head.weight = model.embed.weight
    return model


def by_assign() -> nn.Module:
    model = by_identity()
    model.load_state_dict(by_identity().state_dict(), assign=True)
    return model


def by_data() -> nn.Module:
    model = TwoNames()
    model.head.weight.data = model.embed.weight.data
    return model


def by_a_view() -> nn.Module:
    model = TwoNames()
    model.head.weight = nn.Parameter(model.embed.weight.detach()[:])
    return model


def first_frozen() -> nn.Module:
    model = by_data()
    model.embed.weight.requires_grad_(requires_grad=False)
    return model


def second_frozen() -> nn.Module:
    model = by_data()
    model.head.weight.requires_grad_(requires_grad=False)
    return model


def as_a_buffer() -> nn.Module:
    """The buffer comes first in the state_dict, and the parameter decides."""
    model = TwoNames()
    weight = model.embed.weight
    del model.embed.weight
    model.embed.register_buffer("weight", weight.detach())
    model.head.weight = weight
    return model


def as_two_buffers() -> nn.Module:
    model = TwoNames()
    for module in (model.embed, model.head):
        del module.weight
        module.register_buffer("weight", model.__dict__.setdefault("shared", torch.randn(300_000, 2))[:])
    return model


TIES = [by_identity, by_assign, by_data, by_a_view, first_frozen, second_frozen, as_a_buffer, as_two_buffers]


def objects(model: nn.Module) -> dict[str, Tensor]:
    """Each registered parameter and buffer."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name.removeprefix("module."): tensor for name, tensor in named}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights, in float64."""
    return {name: tensor.detach().double() for name, tensor in objects(model).items()}


@torch.no_grad()
def write(model: nn.Module, step: int) -> None:
    """Changes every tensor once, however many names it has."""
    unique = {tensor.data_ptr(): tensor for tensor in objects(model).values() if tensor.is_floating_point()}
    for tensor in unique.values():
        tensor.mul_(1 + 2.0**-step)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("wrapper", [None, DistributedDataParallel])
@pytest.mark.parametrize("make", TIES)
def test_identical_extents_are_one_tensor(
    make: Callable[[], nn.Module], wrapper: Callable[[nn.Module], nn.Module] | None, tmp_path: Path
) -> None:
    """Updates, swaps, serving, gathering, states, copies and checkpoints, against float64."""
    net = make()
    model = wrapper(net) if wrapper else net
    before = objects(model)
    ema = ShardedEMA(model, decay=0.5)
    expected = weights(model)
    for step in range(1, 4):
        write(model, step)
        ema.update()
        expected = {name: 0.5 * expected[name] + 0.5 * value for name, value in weights(model).items()}
    live = weights(model)
    assert not torch.equal(live["head.weight"], expected["head.weight"])
    # Not through DDP: its broadcast would write to a buffer, and so to the parameter that shares its memory.
    x = torch.ones(1, 2)
    with torch.no_grad(), ema.swapped():
        torch.testing.assert_close(weights(model), expected, rtol=1e-6, atol=0)
        inside = net(x)
    assert_bitwise_equal(weights(model), live)
    with ema.serving():
        assert torch.equal(net(x), inside)
    assert_bitwise_equal(weights(model), live)
    assert {name: id(tensor) for name, tensor in objects(model).items()} == {k: id(v) for k, v in before.items()}
    full = ema.full_state_dict()
    if full:
        assert full["embed.weight"] is full["head.weight"]
        torch.testing.assert_close({k: v.double() for k, v in full.items()}, expected, rtol=1e-6, atol=0)
        make().load_state_dict(full)
    copy = make()
    ema.copy_to(copy)
    torch.testing.assert_close(weights(copy), expected, rtol=1e-6, atol=0)
    root = Path(tmp_path if wrapper else f"{tmp_path}/{dist.get_rank()}")
    if wrapper:
        checkpoint.save({"model": model, "ema": ema}, root, step=1)
        write(model, 1)
        ema.update()
        checkpoint.load({"model": model, "ema": ema}, root)
    else:
        state = ema.state_dict()
        saved = torch.save(state, f"{tmp_path}/{dist.get_rank()}") or torch.load(f"{tmp_path}/{dist.get_rank()}")
        ema.update()
        ema.load_state_dict(saved)
    assert_bitwise_equal(weights(model), live)
    assert_bitwise_equal(ema.full_state_dict(), full)
    average = make()
    compute_ema(copy, average, smoothing=0.0)
    assert_bitwise_equal(weights(average), weights(copy))


@pytest.mark.parametrize("trained", ["embed.weight", "head.weight"])
def test_an_optimizer_of_either_parameter_can_be_attached(trained: str) -> None:
    model = by_data()
    ema = ShardedEMA(model, decay=0.5)
    optimizer = torch.optim.SGD([objects(model)[trained]], lr=1.0)
    ema.attach(optimizer)
    start = weights(model)
    objects(model)[trained].grad = torch.ones(300_000, 2)
    optimizer.step()
    torch.testing.assert_close(ema.full_state_dict()["head.weight"].double(), start["head.weight"] - 0.5)


def test_a_parameter_that_is_unfrozen_later_under_its_second_name_is_an_error() -> None:
    model = by_data()
    for weight in (model.embed.weight, model.head.weight):
        weight.requires_grad_(requires_grad=False)
    ema = ShardedEMA(model)
    model.head.weight.requires_grad_(requires_grad=True)
    with pytest.raises(ValueError, match=r"embed\.weight.*trainable"):
        ema.full_state_dict()


@pytest.mark.world_size(2)
def test_optimizer_states_are_saved_under_the_name_of_each_parameter(tmp_path: Path) -> None:
    """An optimizer has moments for each of the two."""
    model = DistributedDataParallel(by_data())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    model.module.head.weight.grad.mul_(2)
    optimizer.step()
    states = [optimizer.state[parameter]["exp_avg"].clone() for parameter in model.parameters()]
    checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=1)
    optimizer.step()
    checkpoint.load({"model": model, "optim": optimizer}, tmp_path)
    for parameter, expected in zip(model.parameters(), states, strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], expected)
    assert not torch.equal(states[0], states[-1])


def test_writing_and_gradients_inside_serving_are_noticed_under_both_names() -> None:
    model = by_data()
    ema = ShardedEMA(model)
    for module in (model.embed, model.head):
        with pytest.raises(RuntimeError, match=r"head\.weight"), ema.serving(), torch.no_grad():
            module.weight.add_(1)


def test_a_graph_of_either_parameter_refuses_backward_after_copy_to() -> None:
    """Each of them counts its versions on its own."""
    model, other = by_data(), by_data()
    loss = other(torch.ones(1, 2, requires_grad=True)).sum()
    ShardedEMA(model).copy_to(other)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("ranks", [1, 2])
def test_fsdp2_after_load_state_dict_by_assign(ranks: int) -> None:
    """Two Parameters around one DTensor, until FSDP2 runs forward; also where this rank has no rows of it."""
    mesh = init_device_mesh("cpu", (2 // ranks, ranks), mesh_dim_names=("other", "shard"))["shard"]
    for rows in (1, 5):
        torch.manual_seed(0)
        model = by_identity(rows)
        fully_shard(model, mesh=mesh)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state | {"head.weight": state["embed.weight"]}, assign=True)
        assert model.head.weight is not model.embed.weight
        assert Layout(model).ties == {"head.weight": "embed.weight"}
        ema = ShardedEMA(model, decay=0.5)
        before = model.embed.weight.full_tensor().detach().double()
        with torch.no_grad():
            model.embed.weight.add_(1)
        ema.update()
        live = model.embed.weight.full_tensor().detach()
        with ema.serving():
            output = model(torch.ones(1, 2))
        with ema.swapped():
            torch.testing.assert_close(model.embed.weight.full_tensor().double(), before + 0.5)
            assert torch.equal(model(torch.ones(1, 2)), output)
        model.reshard()
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.embed.weight.full_tensor(), live)


def half(model: nn.Module) -> Tensor:
    return model.embed.weight.detach()[:150_000]


def transposed(model: nn.Module) -> Tensor:
    return model.embed.weight.detach().t()


def flat(model: nn.Module) -> Tensor:
    return model.embed.weight.detach().view(-1)


def other_dtype(model: nn.Module) -> Tensor:
    return model.embed.weight.detach().view(torch.bfloat16)


def first_columns(model: nn.Module) -> Tensor:
    model.embed.weight = nn.Parameter(model.embed.weight.detach().view(100_000, 6)[:, 2:])
    return model.embed.weight.detach().as_strided((100_000, 3), (6, 1), 0)


def one_element(model: nn.Module) -> Tensor:
    return model.embed.weight.detach()[7, 1]


def expanded_base(model: nn.Module) -> Tensor:
    return model.embed.weight.detach().expand(3, 300_000, 2)


@pytest.mark.parametrize("is_buffer", [False, True])
@pytest.mark.parametrize(
    "make",
    [half, transposed, flat, other_dtype, first_columns, one_element, expanded_base],
    ids=lambda make: make.__name__,
)
def test_partial_overlaps_are_refused_by_both_names(make: Callable[[nn.Module], Tensor], is_buffer: bool) -> None:  # noqa: FBT001
    model = TwoNames()
    del model.head.weight
    tensor = make(model)
    if is_buffer:
        model.head.register_buffer("weight", tensor)
    else:
        model.head.weight = nn.Parameter(tensor)
    for call in (
        lambda: ShardedEMA(model),
        lambda: ShardedEMA(TwoNames()).copy_to(model),
        lambda: compute_ema(TwoNames(), model),
    ):
        with pytest.raises(ValueError, match=r"embed\.weight.*head\.weight|differ"):
            call()
    with pytest.raises(ValueError, match=r"'embed\.weight' and 'head\.weight'"):
        ShardedEMA(model)


def test_identical_extents_may_differ_in_the_stride_of_a_dimension_of_size_1() -> None:
    model = nn.Module()
    model.first = nn.Parameter(torch.randn(4, 1, 3))
    model.second = nn.Parameter(model.first.detach().as_strided((4, 1, 3), (3, 17, 1)))
    ema = ShardedEMA(model, decay=0.5)
    expected = model.first.detach() + 0.5
    with torch.no_grad():
        model.first.add_(1)
    ema.update()
    full = ema.full_state_dict()
    torch.testing.assert_close(full["first"], expected)
    assert full["second"] is full["first"]


def test_an_overlap_that_comes_later_is_refused_at_the_next_call() -> None:
    model = TwoNames()
    ema = ShardedEMA(model)
    model.head.weight.data = model.embed.weight.data.as_strided((300_000, 2), (1, 300_000))
    with pytest.raises(ValueError, match=r"embed\.weight.*head\.weight"):
        ema.update()


@pytest.mark.parametrize(
    "tensor", [torch.zeros(9).unfold(0, 3, 1), torch.zeros(9).as_strided((2, 2), (1, 1))], ids=["unfold", "window"]
)
def test_tensors_that_overlap_themselves_are_refused_by_name(tensor: Tensor) -> None:
    model = TwoNames()
    model.register_buffer("windows", tensor)
    with pytest.raises(ValueError, match="'windows'"):
        ShardedEMA(model)


@pytest.mark.world_size(2)
def test_an_expanded_dtensor_is_refused_by_name() -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(2, 2)
    model.register_buffer("eye", DTensor.from_local(torch.eye(2).expand(3, 2, 2), mesh, [Replicate()]))
    with pytest.raises(ValueError, match="'eye'"):
        ShardedEMA(model)


class Views(nn.Module):
    """Parameters that are disjoint views of one storage."""

    def __init__(self, **views: Tensor) -> None:
        super().__init__()
        for name, view in views.items():
            self.register_parameter(name, nn.Parameter(view))


def qkv() -> nn.Module:
    query, key, value = torch.randn(6, 4).chunk(3)
    return Views(query=query, key=key, value=value)


def columns() -> nn.Module:
    full = torch.randn(5, 6)
    return Views(left=full[:, :3], right=full[:, 3:])


def interleaved() -> nn.Module:
    full = torch.randn(5, 6)
    return Views(even=full[:, ::2], odd=full[:, 1::2].t())


def lstm() -> nn.Module:
    model = nn.LSTM(3, 4)
    flat = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    for weight, piece in zip(model.parameters(), flat.split([w.numel() for w in model.parameters()]), strict=True):
        weight.data = piece.view_as(weight)
    return model


def without_elements() -> nn.Module:
    empty = torch.empty(0, 3)
    return Views(first=empty, second=empty, third=torch.empty(0, 3), weight=torch.randn(2))


@pytest.mark.world_size(2)
@pytest.mark.parametrize("wrapper", [None, DistributedDataParallel, fully_shard])
@pytest.mark.parametrize("make", [qkv, columns, interleaved, lstm, without_elements])
def test_disjoint_parts_of_one_storage_are_separate(
    make: Callable[[], nn.Module], wrapper: Callable[[nn.Module], nn.Module] | None
) -> None:
    torch.manual_seed(0)
    model = make()
    if wrapper is fully_shard:
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
    if wrapper:
        model = wrapper(model)
    ema = ShardedEMA(model, decay=0.5)
    assert Layout(model).ties == {}
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(index + 1)
    live = [parameter.detach().clone() for parameter in model.parameters()]
    ema.update()
    with ema.swapped():
        for index, (value, parameter) in enumerate(zip(live, model.parameters(), strict=True)):
            torch.testing.assert_close(parameter, value - (index + 1) / 2, msg=names[index])
    for value, parameter in zip(live, model.parameters(), strict=True):
        assert_bitwise_equal({"": local(parameter)}, {"": local(value)})


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def test_overlaps_are_decided_exactly() -> None:
    """Against the sets of bytes, for random strides."""
    draw = random.Random(0)

    def extent() -> Extent:
        itemsize, dims = draw.choice([1, 2, 4]), draw.randint(0, 3)
        strides = tuple(draw.randint(1, 12) * itemsize for _ in range(dims))
        return Extent(draw.randint(0, 20) * itemsize, strides, tuple(draw.randint(2, 4) for _ in range(dims)), itemsize)

    def elements(extent: Extent) -> list[set[int]]:
        starts = [
            extent.start + sum(index * stride for index, stride in zip(indices, extent.strides, strict=True))
            for indices in product(*map(range, extent.sizes))
        ]
        return [set(range(start, start + extent.itemsize)) for start in starts]

    for _ in range(2000):
        left, right = extent(), extent()
        left_bytes, right_bytes = set().union(*elements(left)), set().union(*elements(right))
        assert overlaps(left, right) == bool(left_bytes & right_bytes), (left, right)
        assert overlaps_itself(left) == (len(left_bytes) < sum(map(len, elements(left)))), left


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_buffers_may_be_replaced_together(is_tied: bool) -> None:  # noqa: FBT001
    model = as_two_buffers()
    ema = ShardedEMA(model, decay=0.5)
    value = torch.ones(300_000, 2)
    before = weights(model)["head.weight"]
    model.embed.weight, model.head.weight = value, value if is_tied else value.clone()
    if is_tied:
        ema.update()
        torch.testing.assert_close(ema.full_state_dict()["head.weight"].double(), before / 2 + 0.5)
    else:
        with pytest.raises(ValueError, match=r"embed\.weight.*head\.weight"):
            ema.update()


def test_a_model_that_ties_more_cannot_take_the_averages_of_one_that_ties_less() -> None:
    model, tied = TwoNames(), by_data()
    with pytest.raises(ValueError, match=r"embed\.weight and head\.weight"):
        ShardedEMA(model).copy_to(tied)
    with pytest.raises(ValueError, match=r"embed\.weight and head\.weight"):
        compute_ema(model, tied)
    ShardedEMA(tied).copy_to(model)


@pytest.mark.world_size(2)
def test_tensors_that_only_this_rank_holds_none_of_are_tied_as_elsewhere() -> None:
    mesh = init_device_mesh("cpu", (2,))
    rows = torch.randn(1 - dist.get_rank(), 3)
    first, second = (DTensor.from_local(rows, mesh, [ShardPlacement(0)], shape=(1, 3), stride=(3, 1)) for _ in range(2))
    assert Layout(Views(first=first, second=second)).ties == {"second": "first"}
