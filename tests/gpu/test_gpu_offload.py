"""Averages on the CPU and overlapped updates, as only a GPU can test them: copies, memory, streams, NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, FullyShardedDataParallel, fully_shard

from ema_dist import Offloaded, ShardedEMA, checkpoint, compute_ema
from tests.gpu.test_gpu import LAYOUTS, make_model, no_host_sync
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal, full_weights

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


STAGING_BYTES = 64 * 2**20


@torch.no_grad()
def change_weights(model: nn.Module, step: int) -> None:
    for index, parameter in enumerate(model.parameters()):
        parameter.mul_(1 + 0.01 * (index + step))


def copy_on_cpu(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A plain model on the CPU with these weights, in the dtype of `model`."""
    net = make_model("plain").cpu()
    net.to(next(model.parameters()).dtype)
    net.load_state_dict({name: value.cpu() for name, value in weights.items()})
    return net


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_are_those_of_an_update_in_place_on_the_cpu(layout: str, dtype: torch.dtype) -> None:
    """Bit-identical, also in a swap, serving and a state dict; on a GPU, fused multiply-adds may round differently."""
    model = make_model(layout, dtype)
    ema = ShardedEMA(model, decay=0.75, store=Offloaded())
    reference_model = copy_on_cpu(model, full_weights(model))
    reference = ShardedEMA(reference_model, decay=0.75, kernel="foreach" if dtype is torch.float32 else "scratch")
    for step in range(3):
        change_weights(model, step)
        ema.update()
        reference_model.load_state_dict({name: value.cpu() for name, value in full_weights(model).items()})
        reference.update()
    full = ema.full_state_dict(dtype=torch.float32)
    if full:
        assert_bitwise_equal(full, reference.full_state_dict(dtype=torch.float32))
    live = full_weights(model)
    with ema.swapped():
        inside = full_weights(model)
    assert_bitwise_equal(full_weights(model), live)
    for name, value in full.items():
        if "num_batches" not in name:
            assert torch.equal(inside[name].cpu(), value.to(dtype).double())
    with ema.serving():
        assert (
            ema.serving_mode in ("a copy on the model's device", "a gathered copy") or "swapped()" in ema.serving_mode
        )
    assert_bitwise_equal(full_weights(model), live)
    for average in ema.state_dict()["tracks"]["default"]["averages"].values():
        local = average.to_local() if hasattr(average, "to_local") else average
        shards = average.local_shards() if hasattr(average, "local_shards") else []
        assert all(tensor.device.type == "cpu" for tensor in [shard.tensor for shard in shards] or [local])


@pytest.mark.gpu
@pytest.mark.world_size(1)
def test_an_update_waits_for_nothing_on_the_device() -> None:
    model = nn.Linear(4096, 4096, device="cuda")
    ema = ShardedEMA(model, decay=0.5, store=Offloaded(max_pending=4))
    matrix = torch.randn(8192, 8192, device="cuda")
    finished = torch.cuda.Event()
    for _ in range(20):
        matrix @ matrix
    finished.record()
    with no_host_sync():
        ema.update()
    assert not finished.query()
    ema.state_dict()
    assert finished.query()


@pytest.mark.gpu
@pytest.mark.world_size(1)
def test_the_device_holds_no_averages() -> None:
    model = nn.Sequential(
        nn.Linear(8192, 8192, bias=False, device="cuda"), *(nn.Linear(64, 64, device="cuda") for _ in range(500))
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ema = ShardedEMA(model, decay=0.5, store=Offloaded())
    ema.update()
    with ema.swapped():
        pass
    ema.update()
    ema.state_dict()
    assert torch.cuda.max_memory_allocated() - before <= STAGING_BYTES


@pytest.mark.gpu
@pytest.mark.world_size(1)
def test_a_thousand_small_tensors_are_one_copy() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False, device="cuda") for _ in range(1000)))
    ema = ShardedEMA(model, decay=0.5, store=Offloaded())
    ema.update()
    ema.state_dict()
    with torch.profiler.profile() as profile:
        ema.update()
        torch.cuda.synchronize()
    copies = [event.name for event in profile.events() if "Memcpy DtoH" in event.name]
    assert copies == ["Memcpy DtoH (Device -> Pinned)"]


@pytest.mark.gpu
@pytest.mark.world_size(1)
@pytest.mark.parametrize("store", [None, Offloaded()], ids=str)
def test_the_next_step_waits_for_an_update_that_is_late(store: Offloaded | None) -> None:
    model, reference_model = (nn.Linear(2048, 2048, device="cuda") for _ in range(2))
    reference_model.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (model, reference_model)]
    ema, reference = ShardedEMA(model, decay=0.5, store=store), ShardedEMA(reference_model, decay=0.5, store=store)
    ema.attach(optimizers[0], overlap=True)
    reference.attach(optimizers[1])
    matrix = torch.randn(8192, 8192, device="cuda")
    streams = ema._tracks.streams  # noqa: SLF001
    with streams.fork():
        pass  # the side stream is created on first use
    for step in range(5):
        for module, optimizer in zip((model, reference_model), optimizers, strict=True):
            optimizer.zero_grad()
            module(torch.full((4, 2048), 1.0 + step, device="cuda")).sum().backward()
            with torch.cuda.stream(streams._streams[model.weight.device]):  # noqa: SLF001  delays the update
                for _ in range(5):
                    matrix @ matrix
            optimizer.step()
    assert_bitwise_equal(ema.full_state_dict(), reference.full_state_dict())


@pytest.mark.gpu
@pytest.mark.world_size(1)
@pytest.mark.parametrize("store", [None, Offloaded()], ids=str)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_skipped_on_the_device_are_left_out(fused: bool, overlap: bool, store: Offloaded | None) -> None:  # noqa: FBT001
    model = nn.Linear(8, 8, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    ema = ShardedEMA(model, decay=0.5, store=store)
    ema.attach(optimizer, overlap=overlap)
    expected = [value.cpu() for value in ema.full_state_dict().values()]
    for step in range(4):
        scaler.scale(model(torch.ones(1, 8, device="cuda")).sum()).backward()
        if step == 2 and model.weight.grad is not None:
            model.weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 2:
            live = [value.cpu() for value in model.state_dict().values()]
            expected = [old.lerp(new, 0.5) for old, new in zip(expected, live, strict=True)]
    assert (ema.steps, ema.updates) == (3, 3)
    for actual, reference in zip(ema.full_state_dict().values(), expected, strict=True):
        torch.testing.assert_close(actual, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_averages_are_gathered_and_saved_with_an_nccl_only_group(layout: str, tmp_path: Path) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    store = dist.FileStore(str(tmp_path / "nccl"), size)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=size, device_id=torch.device("cuda", rank))
    model = make_model(layout)
    ema = ShardedEMA(model, decay=0.75, store=Offloaded())
    change_weights(model, 1)
    ema.update()
    full = ema.full_state_dict()
    dcp.save({"ema": ema}, checkpoint_id=tmp_path / "checkpoint")
    again = ShardedEMA(make_model(layout), decay=0.75, store=Offloaded())
    dcp.load({"ema": again}, checkpoint_id=tmp_path / "checkpoint")
    loaded = again.full_state_dict()
    assert_bitwise_equal(loaded, full)
    again.load_full_state_dict(full)
    assert_bitwise_equal(again.full_state_dict(), full)
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "background", step=1, block=False)
    checkpoint.wait()
    change_weights(model, 2)
    ema.update()
    checkpoint.load({"ema": ema}, tmp_path / "background")
    assert_bitwise_equal(ema.full_state_dict(), full)


@pytest.mark.gpu
@pytest.mark.world_size(1)
def test_buffers_on_the_cpu_are_scattered_with_an_nccl_only_group(tmp_path: Path) -> None:
    """NCCL sends no tensors of the CPU, and no int16."""
    dist.destroy_process_group()
    store = dist.FileStore(str(tmp_path / "nccl"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    model = make_model("fsdp2")
    model.register_buffer("angles", torch.randn(5))
    model.register_buffer("counts", torch.arange(5, dtype=torch.int16))
    ema = ShardedEMA(model, decay=0.5)
    full = ema.full_state_dict()
    ema.load_full_state_dict({name: value + 1 for name, value in full.items()})
    assert_bitwise_equal(ema.full_state_dict(), {name: value + 1 for name, value in full.items()})


@pytest.mark.gpu
@pytest.mark.world_size(1)
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("call", ["swapped", "copy_to", "load", "compute_ema"])
@pytest.mark.parametrize("layout", ["fsdp1", "fsdp2"])
def test_weights_in_cpu_memory_are_not_written_to_before_the_device_has_copied_them(
    layout: str, call: str, tmp_path: Path
) -> None:
    """FSDP queues the copies: a pass that still waits for its turn must compute with the weights of its time."""
    net = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(3)))
    if layout == "fsdp1":
        model = FullyShardedDataParallel(net, cpu_offload=CPUOffload(offload_params=True), device_id=0)
    else:
        mesh = init_device_mesh("cuda", (1,))
        for module in (*net, net):
            fully_shard(module, mesh=mesh, offload_policy=CPUOffloadPolicy())
        model = net
    ema = ShardedEMA(model, decay=0.5)
    checkpoint.save({"model": model}, tmp_path, step=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    ema.update()
    calls = {
        "swapped": lambda: ema.swapped().__enter__() and ema.restore(),
        "copy_to": lambda: ema.copy_to(model),
        "load": lambda: checkpoint.load({"model": model}, tmp_path),
        "compute_ema": lambda: compute_ema(nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(3))), model),
    }
    batch, matrix = torch.randn(8, 4096, device="cuda"), torch.randn(8192, 8192, device="cuda")
    with torch.no_grad():
        expected = model(batch).clone()
        torch.cuda.synchronize()
        for _ in range(20):
            matrix @ matrix
        output = model(batch)
        calls[call]()
    assert torch.equal(output, expected)


@pytest.mark.gpu
@pytest.mark.world_size(2)
def test_no_rank_takes_memory_on_the_gpu_of_another() -> None:
    """The thread of `Offloaded` waits for events, which creates a context on the thread's current device."""
    ema = ShardedEMA(nn.Linear(8, 8, device="cuda"), decay=0.5, replicas="copy", store=Offloaded())
    for _ in range(3):
        ema.update()
    ema.state_dict()
    dist.barrier()
    other_device = 1 - dist.get_rank()
    assert not torch._C._cuda_hasPrimaryContext(other_device)  # noqa: SLF001  no public name
