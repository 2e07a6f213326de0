"""The device from which ranks send tensors, and the dtypes: NCCL sends no tensors of the CPU, and not all dtypes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from ema_dist import ShardedEMA
from ema_dist.averages import first_rank
from ema_dist.communication import replica_collectives
from ema_dist.sharding import devices, gather_rows, mesh_shard
from ema_dist.sharding.gather_rows import gather_dim
from ema_dist.sharding.mesh_shard import MeshShard
from ema_dist.sharding.plain_shard import PlainShard
from tests.support.torch_2_7 import IS_BEFORE_TORCH_2_8

CUDA_1, CUDA_2 = torch.device("cuda", 1), torch.device("cuda", 2)
NCCL_DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture
def current_device_is_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(current_device=lambda: 3))


def group_on(*types: str) -> Any:  # noqa: ANN401
    """Stands for a process group; the devices of a real one have no index either."""
    return SimpleNamespace(_device_types=[torch.device(name) for name in types])


@pytest.mark.usefixtures("current_device_is_3")
def test_a_group_sends_from_the_first_device_it_can() -> None:
    cpu = torch.device("cpu")
    assert devices.sending_device(group_on("cuda", "cpu"), cpu, CUDA_1) == cpu
    assert devices.sending_device(group_on("cuda"), cpu, CUDA_1) == CUDA_1
    assert devices.sending_device(group_on("cuda"), cpu) == torch.device("cuda", 3)
    assert devices.sending_device(group_on("cpu"), CUDA_1) == cpu


@pytest.mark.usefixtures("current_device_is_3")
@pytest.mark.parametrize(
    ("device", "expected"), [(CUDA_2, CUDA_2), (torch.device("cpu"), torch.device("cuda", 3))], ids=str
)
def test_a_shard_is_gathered_on_its_own_device_with_the_index(device: torch.device, expected: torch.device) -> None:
    """`.to("cuda")` would copy to the current device: GPU 0 on every rank of a program that never sets it."""
    local: Any = SimpleNamespace(device=device, numel=lambda: 0)
    mesh: Any = SimpleNamespace(device_type="cuda")
    shard = MeshShard(("x",), local, local, mesh=mesh, placements=(), shape=torch.Size(), stride=())
    assert shard.communication_device == expected


def record_collectives(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors given to collectives from now on, those of pickled objects included."""
    recorded: list[Tensor] = []

    def recording(function: Callable[..., object]) -> Callable[..., object]:
        def call(tensor: Tensor, *arguments: object, **options: object) -> object:
            recorded.append(tensor)
            return function(tensor, *arguments, **options)

        return call

    for name in ("broadcast", "all_reduce", "send", "recv"):
        monkeypatch.setattr(dist, name, recording(getattr(dist, name)))
    return recorded


class Counters(nn.Module):
    """Buffers and a frozen parameter of dtypes that NCCL and gloo cannot send."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).view(6, 2))
        self.frozen = nn.Parameter(torch.arange(-3, 4, dtype=torch.int16), requires_grad=False)
        for dtype in (torch.int16, torch.uint16, torch.uint32, torch.complex64, torch.bool, torch.float8_e4m3fn):
            name = str(dtype).removeprefix("torch.")
            self.register_buffer(name, torch.tensor([[1, 0, 1]]).to(dtype))
            self.register_buffer(f"{name}_scalar", torch.tensor(1).to(dtype))


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "layout",
    [
        "replicated",
        pytest.param("fsdp2", marks=pytest.mark.skipif(IS_BEFORE_TORCH_2_8, reason="FSDP2 shards no integers there")),
    ],
)
def test_tensors_of_any_dtype_are_gathered_and_scattered(layout: str) -> None:
    net = Counters()
    if layout == "fsdp2":
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    with pytest.MonkeyPatch.context() as patch:
        sent = record_collectives(patch)
        ema = ShardedEMA(net, buffers="copy", replicas=dist.group.WORLD if layout == "replicated" else "shard")
        full = ema.full_state_dict()
        new = {name: torch.full_like(value, 2) for name, value in full.items() if name != "frozen"}
        ema.load_full_state_dict(new | ({"frozen": full["frozen"]} if full else {}))
        loaded = ema.full_state_dict()
    assert {tensor.dtype for tensor in sent} <= {*NCCL_DTYPES}
    for name, value in new.items():
        assert torch.equal(loaded[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), name


@pytest.mark.world_size(3)
@pytest.mark.parametrize("dtype", [torch.int16, torch.float8_e5m2, torch.complex64], ids=str)
@pytest.mark.parametrize("length", [2, 7, 300], ids=["empty chunks", "broadcast", "long"])
def test_rows_of_any_dtype_are_gathered(dtype: torch.dtype, length: int) -> None:
    expected = torch.arange(length * 4).view(length, 4).remainder(7).to(dtype)
    chunks = expected.chunk(3)
    local = chunks[dist.get_rank()] if dist.get_rank() < len(chunks) else expected[:0]
    gathered = gather_dim(local, 0, length, dist.group.WORLD)  # pyrefly: ignore[bad-argument-type]
    assert torch.equal(gathered.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.world_size(2)
def test_on_a_device_few_ranks_gather_rows_in_one_collective() -> None:
    """A recorder takes tensors of the device ``meta`` in place of the collectives; values: `gather_dim` on the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        sent = record_collectives(patch)
        gathered: list[torch.Size] = []
        patch.setattr(gather_rows, "all_gather", lambda output, *_, **__: gathered.append(output.shape))
        result = gather_dim(torch.empty(3, 2, device="meta"), 0, 6, dist.group.WORLD)  # pyrefly: ignore[bad-argument-type]
    assert result.shape == (6, 2)
    assert gathered == [torch.Size([6 * 2 * 4])]
    assert not sent


@pytest.mark.world_size(3)
@pytest.mark.parametrize("length", [2, 7, 300])
def test_few_ranks_gather_the_same_rows_in_one_collective(length: int) -> None:
    expected = torch.arange(length * 4.0).view(length, 4)
    chunks = expected.chunk(3)
    local = chunks[dist.get_rank()] if dist.get_rank() < len(chunks) else expected[:0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_rows, "MAX_BROADCAST_RANKS", 1)  # as for a device
        gathered = gather_dim(local, 0, length, dist.group.WORLD)  # pyrefly: ignore[bad-argument-type]
    assert torch.equal(gathered, expected)


@pytest.mark.world_size(2)
def test_where_the_group_cannot_send_from_the_cpu_another_device_sends() -> None:
    """It is ``meta`` here, and recorders take its tensors in place of collectives."""
    meta, sent = torch.device("meta"), list[torch.device]()
    ema = ShardedEMA(nn.Linear(2, 2), replicas=dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        for module in (first_rank, replica_collectives):
            patch.setattr(module, "sending_device", lambda *_: meta)
        patch.setattr(first_rank, "broadcast_object", lambda message, *, device, **_: sent.append(device) or message)
        patch.setattr(dist, "broadcast", lambda tensor, *_, **__: sent.append(tensor.device))
        sender = first_rank.FirstRankBroadcast(ema._live.layout)  # noqa: SLF001
        sender.broadcast_tensor(lambda: torch.ones(3), torch.empty(3, device="meta"), torch.device("cpu"))
        patch.setattr(dist, "all_reduce", lambda tensor, *_, **__: sent.append(tensor.device))
        for call in (ema.check_replicas, ema.distance):
            with pytest.raises(NotImplementedError):  # a meta tensor has no values to compare
                call()
    assert sent == [meta] * 4


@pytest.mark.world_size(2)
def test_pipeline_stages_send_from_the_cpu_where_their_group_can() -> None:
    """Gloo's send and recv take an address on a device for one of the host. Its collectives do not."""
    ema = ShardedEMA(nn.ModuleDict({str(dist.get_rank()): nn.Linear(2, 2)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainShard, "communication_device", property(lambda _: CUDA_1))
        group = group_on("cuda", "cpu")
        patch.setattr(first_rank, "sending_device", lambda _, *preferred: devices.sending_device(group, *preferred))
        sent = record_collectives(patch)
        full = ema.full_state_dict(pipeline=dist.group.WORLD)
    assert len(full) == (4 if dist.get_rank() == 0 else 0)
    assert {tensor.device.type for tensor in sent} == {"cpu"}


@pytest.mark.world_size(1)
def test_an_offloaded_part_is_copied_as_the_caller_says() -> None:
    meta, copied = torch.device("meta"), list[tuple[torch.device, torch.device]]()
    local = torch.ones(4, 3)
    shard = MeshShard(
        ("x",),
        local,
        local,
        mesh=init_device_mesh("cpu", (1,)),
        placements=[Shard(0)],
        shape=local.shape,
        stride=local.stride(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeshShard, "communication_device", property(lambda _: meta))
        patch.setattr(mesh_shard, "gather_dim", lambda rows, *_: rows)
        full = shard.full(local, lambda target, source: copied.append((target.device, source.device)))
        assert shard.slice_full(local).device == local.device, "a slice is taken where the full tensor is"
    assert full.device == meta
    assert copied == [(meta, local.device)]
