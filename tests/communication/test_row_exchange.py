"""Replicas are filled bit-identically, in a number of collectives that depends on bytes only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from ema_dist.communication import replica_collectives, row_exchange
from ema_dist.communication.replica_collectives import all_gather_parts, describe_drift
from ema_dist.kernels import CPU_SCRATCH_BYTES
from ema_dist.sharding import Layout, Shard
from ema_dist.sharding.mesh_shard import split_rows
from ema_dist.sharding.plain_shard import PlainShard
from launch.cost.fake_ranks import fake_ranks

DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int16, torch.int64, torch.float8_e4m3fn),
)
SHAPES = [(30, 3), (7, 5), (1, 6), (2, 2), (9,), (0, 4), (40, 2, 3)]


def _full_tensors() -> list[Tensor]:
    """Of every dtype and shape, any bits, NaN included; the last one is permuted and starts inside a storage."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for dtype in DTYPES:
        for shape in SHAPES:
            size = (*shape, dtype.itemsize)
            bits = torch.randint(0, 2 if dtype == torch.bool else 256, size, dtype=torch.uint8, generator=generator)
            tensors.append(bits.flatten().view(dtype).view(shape))
    permuted = torch.randn(3, 11, 2, 5, generator=generator)[1].permute(0, 2, 1)
    return [*tensors, permuted]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _shard_with_own_rows(full: Tensor) -> Shard:
    """A replica's copy of a tensor in which the rows of other replicas are zero."""
    local = torch.empty_like(full)
    _bits_in_memory(local).zero_()
    shard = PlainShard(("weight",), local, local, replica_group=dist.group.WORLD)
    if full.numel():
        shard.averaged_part = split_rows(shard, DeviceMesh.from_group(dist.group.WORLD, "cpu"), [], full.stride())
    for index, (target, source) in enumerate(
        zip(local.chunk(dist.get_world_size()), full.chunk(dist.get_world_size()), strict=True)
    ):
        if index == dist.get_rank():
            target.copy_(source)
    return shard


def _bits_in_memory(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


@pytest.mark.world_size(4)
@pytest.mark.parametrize("scratch_bytes", [480, 5000, CPU_SCRATCH_BYTES])
def test_rows_of_every_dtype_arrive_bit_identically(scratch_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also rows that do not divide evenly, replicas without rows, and tensors that several collectives send."""
    monkeypatch.setattr(row_exchange, "max_scratch_bytes", lambda _: scratch_bytes)
    fulls = _full_tensors()
    shards = [_shard_with_own_rows(full) for full in fulls]
    all_gather_parts(shards)
    assert [
        (full.dtype, tuple(full.shape))
        for full, shard in zip(fulls, shards, strict=True)
        if not torch.equal(_bits(shard.local), _bits(full))
    ] == []


@pytest.mark.world_size(3)
@pytest.mark.parametrize("name", ["all_gather", "merge_bytes"])
def test_a_fill_that_failed_can_be_made_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second collective fails, when a part of the tensors is filled already."""
    monkeypatch.setattr(row_exchange, "max_scratch_bytes", lambda _: 96)
    fulls = _full_tensors()
    shards = [_shard_with_own_rows(full) for full in fulls]
    with monkeypatch.context() as patch:
        patch.setattr(row_exchange, name, _failing_second_time(getattr(row_exchange, name)))
        with pytest.raises(ZeroDivisionError):
            all_gather_parts(shards)
    all_gather_parts(shards)
    assert all(torch.equal(_bits(shard.local), _bits(full)) for full, shard in zip(fulls, shards, strict=True))


def _failing_second_time(collective: Callable[..., object]) -> Callable[..., object]:
    calls = iter([False, True])

    def call(*args: object, **settings: object) -> object:
        if next(calls):
            raise ZeroDivisionError
        return collective(*args, **settings)

    return call


@pytest.mark.world_size(3)
def test_tensors_are_sent_from_the_device_that_communicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As averages on the CPU beside NCCL, with a device that only looks like another one."""
    full = torch.arange(70.0).view(7, 10)
    shards = [_shard_with_own_rows(full), _shard_with_own_rows(full[:1])]
    empty_like = torch.empty_like
    other = torch.device("cuda")
    sent: list[int] = []

    def make(tensor: Tensor, *, device: torch.device) -> Tensor:
        assert device == other
        sent.append(tensor.nbytes)
        return empty_like(tensor)

    monkeypatch.setattr(PlainShard, "communication_device", property(lambda _: other))
    monkeypatch.setattr(torch, "empty_like", make)
    all_gather_parts(shards)
    assert len(sent) == 2
    assert torch.equal(shards[0].local, full)
    assert torch.equal(shards[1].local, full[:1])


def _collectives(
    replicas: int, shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, int]]:
    """The collectives that fill a model under DDP, with the bytes of their results."""
    made: list[tuple[str, int]] = []
    with fake_ranks(replicas):
        net = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
        layout = Layout(DistributedDataParallel(net))
        for name in ("all_gather", "merge_bytes"):
            monkeypatch.setattr(
                row_exchange, name, lambda result, *_, name=name, **__: made.append((name, result.nbytes))
            )
        all_gather_parts(layout.parameters.values())
    return made


def test_the_number_of_collectives_depends_on_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ten rows for each replica and one left over, the padding is as large as it gets: less than a tenth."""
    counts = []
    for replicas in (4, 16, 256):
        shapes = [(10 * replicas + 1, 32 * 256 // replicas)] * 15
        size = sum(4 * rows * columns for rows, columns in shapes)
        made = _collectives(replicas, shapes, monkeypatch)
        assert {name for name, _ in made} == {"all_gather"}
        assert max(nbytes for _, nbytes in made) <= CPU_SCRATCH_BYTES
        assert sum(nbytes for _, nbytes in made) <= 1.1 * size + replicas * row_exchange.ALIGNMENT
        counts.append(len(made))
    assert max(counts) <= 1.1 * (10 * 32 * 256 * 4 * 15) / CPU_SCRATCH_BYTES + 2


@pytest.mark.parametrize("replicas", [256, 4096])
def test_few_rows_are_sent_without_padding(replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _collectives(replicas, [(64, 64)] * 300, monkeypatch)
    size = 4 * 64 * 64 * 300
    assert made == [("merge_bytes", CPU_SCRATCH_BYTES)] * (size // CPU_SCRATCH_BYTES) + [
        ("merge_bytes", size % CPU_SCRATCH_BYTES)
    ]


@pytest.mark.parametrize("drifted", [0, 1, 25])
def test_only_the_checksums_of_some_differing_tensors_are_gathered(
    drifted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One all-reduce of two numbers for each tensor; the others of thousands of ranks are not asked."""
    made: list[tuple[str, int]] = []

    def reduce(bounds: Tensor, *_: Any, **__: Any) -> None:  # noqa: ANN401
        made.append(("all_reduce", bounds.nbytes))
        bounds[0, :drifted] += 1  # another replica has larger checksums

    def gather(result: Tensor, *_: Any, **__: Any) -> None:  # noqa: ANN401
        made.append(("all_gather", result.nbytes))
        result.view(64, -1).copy_(torch.arange(64)[:, None] == 5)

    with fake_ranks(64):
        layout = Layout(DistributedDataParallel(nn.ParameterList([nn.Parameter(torch.ones(3)) for _ in range(30)])))
        monkeypatch.setattr(dist, "all_reduce", reduce)
        monkeypatch.setattr(replica_collectives, "all_gather", gather)
        message = describe_drift(layout.parameters.values())
    assert made[0] == ("all_reduce", 2 * 8 * 30)
    assert made[1:] == ([("all_gather", 64 * 8 * min(drifted, 10))] if drifted else [])
    assert ("rank 5" in message, "20 more" in message) == (drifted > 0, drifted == 25)
