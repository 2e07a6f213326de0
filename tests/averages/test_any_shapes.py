"""Any shape, any cut, any order of calls."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from ema_dist import ShardedEMA
from ema_dist.kernels import chunks
from ema_dist.sharding import Layout
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(st.lists(SHAPES, max_size=4), st.integers(1, 200))
def test_chunks_cover_everything_within_the_limit(shapes: list[list[int]], max_bytes: int) -> None:
    tensors = [torch.zeros(shape) for shape in shapes]
    for (batch,) in chunks(tensors, max_bytes=max_bytes):
        assert sum(piece.numel() * 4 for piece in batch) <= max(max_bytes, 4)
        for piece in batch:
            piece.add_(1)
    assert all((tensor == 1).all() for tensor in tensors)


class Tensors(nn.Module):
    """Parameters of any shapes, the first one tied, and a buffer."""

    def __init__(self, shapes: list[list[int]], *, scalar: bool) -> None:
        super().__init__()
        self.parts = nn.ParameterList([torch.randn(shape) for shape in shapes])
        self.tied = nn.ParameterList([self.parts[0]])
        if scalar:
            self.scalar = nn.Parameter(torch.randn(()))
        self.register_buffer("count", torch.tensor(0))

    def forward(self) -> Tensor:
        return sum(part.square().sum() for part in self.parameters())  # pyrefly: ignore[bad-return]


WRAPPERS = {
    "plain": lambda net: net,
    "ddp": DistributedDataParallel,
    "fsdp1": lambda net: FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu")),
    "fsdp2": lambda net: fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),))),
}


@pytest.mark.parametrize("wrapper", [pytest.param(name, marks=pytest.mark.world_size(3)) for name in WRAPPERS])
@pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")
def test_any_sequence_of_calls_on_any_shapes(wrapper: str, tmp_path: Path) -> None:
    """Uneven, empty, scalar and tied tensors; update, swap, save and load in any order: always the reference."""
    numbers = count()

    @settings(max_examples=12)
    @given(
        st.lists(SHAPES, min_size=1, max_size=4),
        st.booleans(),
        st.lists(st.sampled_from(["update", "swap", "save", "load", "scatter"]), max_size=7),
        st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def check(shapes: list[list[int]], scalar: bool, calls: list[str], dtype: torch.dtype) -> None:  # noqa: FBT001
        torch.manual_seed(0)
        net = Tensors(shapes, scalar=scalar and wrapper in ("plain", "ddp")).to(dtype)
        names = list(net.state_dict())
        model = WRAPPERS[wrapper](net)
        ema = ShardedEMA(model, decay=0.5)
        reference = live_in_float32(model, names)
        saved = path = None
        for step, call in enumerate(calls):
            with torch.no_grad():
                for index, parameter in enumerate(model.parameters()):
                    parameter.mul_(1 + 0.1 * (index + step))
            if call == "update":
                ema.update()
                live = live_in_float32(model, names)
                reference = {name: value.lerp(live[name], 0.5) for name, value in reference.items()}
            elif call == "swap":
                before = live_in_float32(model, names)
                with ema.swapped():
                    assert_close(
                        live_in_float32(model, names), reference, tolerance=1e-2 if dtype == torch.bfloat16 else 1e-6
                    )
                assert_bitwise_equal(live_in_float32(model, names), before)
            elif call == "save":
                path = tmp_path / str(next(numbers))
                dcp.save({"ema": ema}, checkpoint_id=path)
                saved = reference
            elif call == "load" and saved is not None:
                dcp.load({"ema": ema}, checkpoint_id=path)
                reference = saved
            elif call == "scatter":
                reference = {name: value + 1 for name, value in reference.items()}
                ema.load_full_state_dict(reference | {"count": torch.tensor(0)})
        full = ema.full_state_dict(dtype=torch.float32)
        if full:
            assert sorted(full) == sorted(names)
            assert_close({name: full[name] for name in reference}, reference, tolerance=1e-6)

    check()


def live_in_float32(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Full live parameters on every rank."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            parameters = dict(model.module.named_parameters(remove_duplicate=False))
            return {name: parameters[name].detach().clone().float() for name in names if name != "count"}
    parameters = dict(
        (model.module if isinstance(model, DistributedDataParallel) else model).named_parameters(remove_duplicate=False)
    )
    full = {name: parameters[name].detach() for name in names if name != "count"}
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone().float()
        for name, value in full.items()
    }


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.world_size(1)
def test_who_owns_what_on_rank_3_of_8() -> None:
    """Seen through a fake process group: no other rank needs to exist."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("replicate", "shard"))

    def parts(model: nn.Module) -> tuple[int, int]:
        shard = Layout(model).parameters["weight"]
        return shard.local.numel(), shard.averaged_part.local.numel()

    rows = 3 * 15
    assert parts(nn.Linear(3, 15)) == (rows, rows)
    assert parts(DistributedDataParallel(nn.Linear(3, 15))) == (rows, 3 * 2)
    assert parts(fully_shard(nn.Linear(3, 15), mesh=mesh["shard"])) == (3 * 3, 3 * 3)
    assert parts(fully_shard(nn.Linear(3, 15), mesh=mesh)) == (3 * 3, 3 * 2)
    assert Layout(fully_shard(nn.Linear(3, 15), mesh=mesh)).ranks == list(range(8))
    assert parts(WRAPPERS["fsdp1"](nn.Linear(3, 15))) == (8, 8)
