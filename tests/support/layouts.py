"""A small model with awkward shapes, every layout to wrap it in, and its full weights as torch gathers them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ema_dist import ShardedEMA
from tests.support.torch_2_7 import FSDP2_TP_ROWS


class Block(nn.Module):
    """A residual block with awkward shapes, and a child called `module`.

    Seven rows cannot be sharded evenly over 2 to 4 ranks. One row leaves all ranks but the first empty.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.module = nn.Linear(6, hidden)
        self.out = nn.Linear(hidden, 6)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.ones(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.out(self.module(x).relu())) * self.scale


class Net(nn.Module):
    """Two blocks between a tied input and output, a frozen layer, running statistics and a persistent mask."""

    mask: Tensor

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 5, bias=False)
        self.frozen = nn.Linear(6, 6).requires_grad_(requires_grad=False)
        self.blocks = nn.ModuleList([Block(hidden), Block(hidden)])
        self.stats = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([0.0, float("-inf"), 1.0]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.stats(x)) + self.embed(x)


def make_net(*layouts: str, seed: int = 0) -> Net:
    """A `Net` with the same weights on every rank, in shapes that each of `layouts` can wrap."""
    torch.manual_seed(seed)
    return Net(min(LAYOUTS[layout].hidden for layout in layouts))


@dataclass(frozen=True)
class LayoutSpec:
    """How to wrap a `Net`, the number of ranks, and the rows of the hidden layer."""

    wrap: Callable[[nn.Module], nn.Module]
    ranks: int = 2
    hidden: int = 7  # TP needs an even split: of 6 rows, each of 2 ranks has 3, which FSDP2 still shards unevenly


def _mesh(net: nn.Module, shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh for the device of `net`; for the CPU, if `net` is on the meta device."""
    device_type = next(net.parameters()).device.type
    return init_device_mesh("cpu" if device_type == "meta" else device_type, shape, mesh_dim_names=names)


def _ddp(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net)


def _fsdp1(net: nn.Module, strategy: str = "FULL_SHARD", *, use_orig_params: bool = True) -> nn.Module:
    own_flat_module = None if use_orig_params else net.frozen  # one flat parameter cannot be partly frozen
    hybrid = strategy == "HYBRID_SHARD"
    mesh = _mesh(net, (2, dist.get_world_size() // 2) if hybrid else (dist.get_world_size(),))
    return FullyShardedDataParallel(
        net,
        auto_wrap_policy=CustomPolicy(lambda module: isinstance(module, Block) or module is own_flat_module),
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=use_orig_params,
        device_id=next(net.parameters()).device,
        device_mesh=mesh,
    )


def _fsdp2(net: nn.Module, *, nested: bool = True, reshard: bool = True, replicas: int = 1) -> nn.Module:
    shape = (dist.get_world_size(),) if replicas == 1 else (replicas, dist.get_world_size() // replicas)
    mesh = _mesh(net, shape, names=("shard",) if replicas == 1 else ("replicate", "shard"))
    for block in net.blocks if nested else []:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(net, mesh=mesh, reshard_after_forward=reshard)


TP_PLAN = {
    "blocks.*.module": partial(ColwiseParallel),
    "blocks.*.out": partial(RowwiseParallel),
}


def _tp(net: nn.Module) -> nn.Module:
    mesh = _mesh(net, (dist.get_world_size(),))
    return parallelize_module(net, mesh, {name: style() for name, style in TP_PLAN.items()})


def _fsdp2_tp(net: nn.Module) -> nn.Module:
    mesh = _mesh(net, (dist.get_world_size() // 2, 2), names=("data", "model"))
    parallelize_module(net, mesh["model"], {name: style() for name, style in TP_PLAN.items()})
    for block in net.blocks:
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(net, mesh=mesh["data"])


def _activation_checkpointed(net: nn.Module, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
    apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, Block))
    return wrapper(net)


def _compiled(net: nn.Module, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return torch.compile(wrapper(net), backend="eager")


LAYOUTS = {
    "plain": LayoutSpec(lambda net: net, ranks=1),
    "ddp": LayoutSpec(_ddp),
    "ddp-3": LayoutSpec(_ddp, ranks=3),
    "fsdp1": LayoutSpec(_fsdp1),
    "fsdp1-3": LayoutSpec(_fsdp1, ranks=3),
    "fsdp1-flat": LayoutSpec(partial(_fsdp1, use_orig_params=False)),
    "fsdp1-grad-op": LayoutSpec(partial(_fsdp1, strategy="SHARD_GRAD_OP")),
    "fsdp1-flat-grad-op": LayoutSpec(partial(_fsdp1, strategy="SHARD_GRAD_OP", use_orig_params=False)),
    "fsdp1-no-shard": LayoutSpec(partial(_fsdp1, strategy="NO_SHARD")),
    "fsdp1-hybrid": LayoutSpec(partial(_fsdp1, strategy="HYBRID_SHARD"), ranks=4),
    "fsdp2": LayoutSpec(_fsdp2),
    "fsdp2-1": LayoutSpec(_fsdp2, ranks=1),
    "fsdp2-3": LayoutSpec(_fsdp2, ranks=3),
    "fsdp2-4": LayoutSpec(_fsdp2, ranks=4),
    "fsdp2-root": LayoutSpec(partial(_fsdp2, nested=False)),
    "fsdp2-keep": LayoutSpec(partial(_fsdp2, reshard=False)),
    "hsdp": LayoutSpec(partial(_fsdp2, replicas=2), ranks=4),
    "tp": LayoutSpec(_tp, hidden=6),
    "fsdp2-tp": LayoutSpec(_fsdp2_tp, ranks=4, hidden=FSDP2_TP_ROWS),
    "ddp-checkpointed": LayoutSpec(partial(_activation_checkpointed, wrapper=_ddp)),
    "fsdp1-checkpointed": LayoutSpec(partial(_activation_checkpointed, wrapper=_fsdp1)),
    "fsdp2-checkpointed": LayoutSpec(partial(_activation_checkpointed, wrapper=_fsdp2)),
    "ddp-compiled": LayoutSpec(partial(_compiled, wrapper=_ddp)),
    "hsdp-checkpointed": LayoutSpec(partial(_activation_checkpointed, wrapper=partial(_fsdp2, replicas=2)), ranks=4),
    "tp-checkpointed": LayoutSpec(
        lambda net: _activation_checkpointed(_tp(net), wrapper=lambda wrapped: wrapped), hidden=6
    ),
    "fsdp2-tp-checkpointed": LayoutSpec(
        lambda net: _activation_checkpointed(_fsdp2_tp(net), wrapper=lambda wrapped: wrapped),
        ranks=4,
        hidden=FSDP2_TP_ROWS,
    ),
    "plain-compiled": LayoutSpec(partial(_compiled, wrapper=lambda net: net), ranks=1),
    "fsdp1-compiled": LayoutSpec(partial(_compiled, wrapper=_fsdp1)),
    "fsdp2-compiled": LayoutSpec(partial(_compiled, wrapper=_fsdp2)),
    "hsdp-compiled": LayoutSpec(partial(_compiled, wrapper=partial(_fsdp2, replicas=2)), ranks=4),
    "tp-compiled": LayoutSpec(partial(_compiled, wrapper=_tp), hidden=6),
    "fsdp2-tp-compiled": LayoutSpec(partial(_compiled, wrapper=_fsdp2_tp), ranks=4, hidden=FSDP2_TP_ROWS),
}


STORAGE_LAYOUTS = (
    *("plain", "ddp", "fsdp1", "fsdp1-flat", "fsdp1-hybrid", "fsdp1-no-shard", "fsdp2-3", "hsdp", "tp", "fsdp2-tp"),
)
"""One layout for each way to store live weights and averages, for tests of what depends on nothing else.

Compilation and activation checkpointing change names and the forward pass; other world sizes change the number of rows.
"""

IGNORE_INITIAL_WEIGHTS_WARNING = pytest.mark.filterwarnings("ignore::ema_dist.InitialWeightsWarning")
"""For tests that read averages after a few steps, when much of them is still the initial weights."""

IGNORED_WARNINGS = (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    pytest.mark.filterwarnings("ignore:The `NO_SHARD` sharding strategy is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # dynamo
    pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning"),  # FSDP1 saves ShardedTensor
    pytest.mark.filterwarnings("ignore:`_get_pg_default_device` will be deprecated:UserWarning"),  # called by FSDP1
    pytest.mark.filterwarnings("ignore:Multiple backends are registered with this ProcessGroup:UserWarning"),  # FSDP1
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning"),
)


def layouts(*names: str) -> pytest.MarkDecorator:
    """Parametrizes `layout` by name, each on as many ranks as it needs; without names, by all layouts."""
    chosen = names or tuple(LAYOUTS)
    return pytest.mark.parametrize(
        "layout",
        [pytest.param(name, marks=(pytest.mark.world_size(LAYOUTS[name].ranks), *IGNORED_WARNINGS)) for name in chosen],
    )


def wrap(layout: str, net: nn.Module) -> nn.Module:
    """Returns `net` wrapped in `layout`."""
    return LAYOUTS[layout].wrap(net)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every full tensor of the model in float64 by canonical name, on every rank, as torch gathers them."""
    if not FullyShardedDataParallel.fsdp_modules(model):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        return {name: tensor.detach().clone().double() for name, tensor in state.items()}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {
            _canonical_name(name): tensor.detach().clone().double() for name, tensor in named if "scratch" not in name
        }


def _canonical_name(name: str) -> str:
    for segment in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(segment, "")
    return name


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One optimizer step on a batch that is the same on every rank and for every layout."""
    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    model.train()
    batch = batch.to(next(model.parameters()).device)
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def make_trained(layout: str, net: Net | None = None, **settings: Any) -> tuple[nn.Module, ShardedEMA]:  # noqa: ANN401
    """A wrapped model after three steps, and its averages."""
    model = wrap(layout, net or make_net(layout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ema = ShardedEMA(model, **{"decay": 0.8} | settings)
    for step in range(3):
        train_step(model, optimizer, step)
        ema.update()
    return model, ema


def averages_of_tracks(ema: ShardedEMA) -> dict[str, Tensor]:
    """The full averages of every track in float64, under the name of the track and the tensor."""
    return {
        f"{track} {name}": value
        for track in ema.tracks
        for name, value in ema.full_state_dict(track=track, dtype=torch.float64).items()
    }


def assert_bitwise_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names and bit-identical values, compared in float64."""
    assert actual.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(actual[name].double(), value.double())] == []


@torch.no_grad()
def evaluate(model: nn.Module) -> Tensor:
    """The outputs on a fixed batch."""
    model.eval()
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(-1))
    return model(batch.to(next(model.parameters()).device)).clone()


def peak_memory(call: Callable[[], object]) -> int:
    """Peak bytes of tensors that `call` allocated, beyond those that existed before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = current = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    del result
    return peak


def peak_resident_memory(call: Callable[[], object]) -> int:
    """Peak resident bytes of the process during `call`, beyond those before it."""
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
