"""Properties that need a GPU to test: no host synchronisation, NCCL, device memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ema_dist import Offloaded, ShardedEMA
from ema_dist.kernels import DEVICE_SCRATCH_BYTES
from ema_dist.kernels.bus_copy import STAGING_BYTES
from ema_dist.kernels.selection import MAX_MEASURED_NUMEL_ON_DEVICE
from ema_dist.sharding import local_tensor
from tests.schedules.laws import LAWS
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal, full_weights

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING

TABLE_BYTES = 2**20
"""Room for what kernels keep on the device, such as Triton's tables of addresses."""


def make_model(layout: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 7)).to("cuda", dtype)
    if layout == "plain":
        return net
    if layout == "ddp":
        return DistributedDataParallel(net, device_ids=[dist.get_rank()])
    if layout == "fsdp1":
        return FullyShardedDataParallel(net, device_id=dist.get_rank(), use_orig_params=True)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    return fully_shard(net, mesh=mesh)  # pyrefly: ignore[bad-return]


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raises an error wherever the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


LAYOUTS = [
    pytest.param("plain", marks=pytest.mark.world_size(1)),
    *[
        pytest.param(layout, marks=pytest.mark.world_size(ranks), id=f"{layout}-{ranks}")
        for layout in ("ddp", "fsdp1", "fsdp2")
        for ranks in (1, 2)
    ],
]


@pytest.mark.gpu
@pytest.mark.world_size(1)
def test_deep_copies_of_sharded_states_are_on_the_cpu() -> None:
    """DCP's `DefaultStager` does not move values of this type, and sends the copies to the process that writes."""
    state = ShardedEMA(make_model("fsdp2"), decay=0.75).state_dict()
    copied = copy.deepcopy(state)
    for name, average in state["tracks"]["default"]["averages"].items():
        staged = copied["tracks"]["default"]["averages"][name]
        assert (local_tensor(staged).device.type, local_tensor(average).device.type) == ("cpu", "cuda")
        assert torch.equal(local_tensor(staged), local_tensor(average).cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_swap_and_gather_on_the_device(layout: str, dtype: torch.dtype) -> None:
    model = make_model(layout, dtype)
    ema = ShardedEMA(model, decay=0.75)
    reference = full_weights(model)
    for step in range(3):
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                parameter.mul_(1 + 0.1 * (index + step))
        with no_host_sync():
            ema.update()
        live = full_weights(model)
        reference = {
            name: 0.75 * value + 0.25 * live[name] if value.is_floating_point() else live[name]
            for name, value in reference.items()
        }
    full = ema.full_state_dict(dtype=torch.float32)
    for name, value in full.items():
        if name != "1.num_batches_tracked":
            torch.testing.assert_close(value.double(), reference[name].cpu(), rtol=1e-5, atol=1e-6)
    live = full_weights(model)
    with ema.swapped():
        inside = full_weights(model)
    assert_bitwise_equal(full_weights(model), live)
    for name, value in full.items():
        assert (
            torch.equal(inside[name].cpu(), value.to(dtype if name[0] in "02" else value.dtype).double())
            or "1." in name
        )


@pytest.mark.gpu
@pytest.mark.world_size(1)
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.float64]], ids=len)
def test_a_swap_takes_a_constant_amount_of_device_memory(dtypes: list[torch.dtype]) -> None:
    """Weights of several dtypes share one scratch."""
    model = nn.Sequential(*(nn.Linear(16384, 8192, bias=False, device="cuda", dtype=dtype) for dtype in dtypes))
    ema = ShardedEMA(model)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with ema.swapped():
        pass
    assert torch.cuda.max_memory_allocated() - before <= DEVICE_SCRATCH_BYTES


@pytest.mark.gpu
@pytest.mark.world_size(1)
@pytest.mark.parametrize("overlap", [False, True])
def test_laws_on_the_device_do_not_wait(overlap: bool) -> None:  # noqa: FBT001
    """Of steps that only the device knows to be skipped: no number is copied there or back."""
    model = nn.Linear(64, 96, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    on_device = ShardedEMA(model, decay=LAWS, start=250, update_interval=2)
    on_device.attach(optimizer, elapsed=lambda: 100, overlap=overlap)
    on_host = ShardedEMA(model, decay=LAWS, start=250, update_interval=2)
    for step in range(12):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, step + 1.0)
        # As GradScaler does for a fused optimizer.
        optimizer.grad_scale = torch.ones((), device="cuda")  # pyrefly: ignore[missing-attribute]
        optimizer.found_inf = torch.full((), float(step % 5 == 3), device="cuda")  # pyrefly: ignore[missing-attribute]
        with no_host_sync():
            optimizer.step()
        if step % 5 != 3:
            on_host.update(elapsed=100)
    assert (on_device.steps, on_device.time) == (on_host.steps, on_host.time) == (10, 1000.0)
    for name, value in on_host.metrics().items():
        assert on_device.metrics()[name] == pytest.approx(value, rel=1e-12, abs=1e-300)
    for track in LAWS:
        full = on_device.full_state_dict(track=track)
        for name, value in on_host.full_state_dict(track=track).items():
            torch.testing.assert_close(full[name], value)


def peak_device_memory(call: Callable[[], object]) -> int:
    """Peak bytes that `call` allocated on the device, beyond those before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def swap(ema: ShardedEMA) -> None:
    with ema.swapped():
        pass


def serve(ema: ShardedEMA) -> None:
    with ema.serving():
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("call", [ShardedEMA.update, swap, serve])
def test_calls_take_bounded_device_memory(call: Callable[[ShardedEMA], object]) -> None:
    """On a model of three dtypes: one scratch for all of them, and what the docs say of another dtype."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    model = nn.Sequential(*(nn.Linear(8192, 8192, bias=False, device="cuda", dtype=dtype) for dtype in dtypes))
    live_bytes = sum(parameter.nbytes for parameter in model.parameters())
    ema = ShardedEMA(model)
    copied_bytes = 0 if call is ShardedEMA.update else live_bytes
    assert peak_device_memory(lambda: call(ema)) <= DEVICE_SCRATCH_BYTES + copied_bytes


@pytest.mark.gpu
def test_construction_takes_the_averages_and_what_is_measured() -> None:
    model = nn.Linear(16384, 16384, bias=False, device="cuda", dtype=torch.bfloat16)
    made: list[ShardedEMA] = []
    peak = peak_device_memory(lambda: made.append(ShardedEMA(model)))
    averages = model.weight.numel() * 4
    measured = (2 + 4) * MAX_MEASURED_NUMEL_ON_DEVICE  # live values in bfloat16, and a track in float32
    assert peak <= averages + measured + DEVICE_SCRATCH_BYTES + TABLE_BYTES


@pytest.mark.gpu
def test_pinned_memory_does_not_grow_with_swaps() -> None:
    if not hasattr(torch.cuda, "host_memory_stats"):
        pytest.skip("this version of torch does not count pinned memory")
    model = nn.Linear(8192, 8192, bias=False, device="cuda", dtype=torch.bfloat16)
    ema = ShardedEMA(model, store=Offloaded())
    pinned: list[int] = []
    for _ in range(4):
        ema.update()
        swap(ema)
        pinned.append(torch.cuda.host_memory_stats()["allocated_bytes.current"])
    assert pinned[1:] == [pinned[1]] * 3
    assert pinned[-1] <= 2 * model.weight.nbytes + 2 * STAGING_BYTES


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler, about this GPU
def test_a_compiled_model_with_cuda_graphs_is_served_and_swapped() -> None:
    net = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)).cuda().eval()
    batch = torch.randn(32, 256, device="cuda")
    ema = ShardedEMA(net, decay=0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
        ema.update()
        with ema.swapped():
            expected = net(batch).clone()
        live = net(batch).clone()
        model = torch.compile(net, mode="reduce-overhead")
        for _ in range(3):
            torch.testing.assert_close(model(batch).clone(), live, rtol=1e-3, atol=1e-4)
        for block in (ema.serving, ema.swapped):
            with block():
                for _ in range(3):
                    torch.testing.assert_close(model(batch).clone(), expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(model(batch).clone(), live, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_the_distance_of_a_model_on_two_devices() -> None:
    model = nn.Sequential(nn.Linear(8, 8, device="cuda"), nn.Linear(8, 8))
    on_host = copy.deepcopy(model).cpu()
    distances: list[float] = []
    for net in (model, on_host):
        ema = ShardedEMA(net, decay=0.5)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(2)
        ema.update()
        distances.append(ema.distance())
    assert distances[0] == pytest.approx(distances[1], rel=1e-6)


@pytest.mark.gpu
def test_updates_follow_each_replay_of_a_captured_step() -> None:
    """Inside of the capture they are refused."""
    model = nn.Linear(64, 64, bias=False, device="cuda")
    ema = ShardedEMA(model, decay=0.5)
    average, live = model.weight.detach().clone(), model.weight.detach()
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
    model.weight.grad = torch.ones_like(model.weight)
    handle = ema.attach(optimizer)
    with pytest.raises(RuntimeError, match="captures a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    handle.remove()
    with pytest.raises(RuntimeError, match="captures a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        live.mul_(1.25)
        ema.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        live.mul_(1.25)
    for _ in range(3):
        graph.replay()
        ema.update()
        average.lerp_(live, 0.5)
    assert ema.steps == 3
    torch.testing.assert_close(ema.full_state_dict()["weight"], average.cpu())


@pytest.mark.gpu
def test_a_graphed_callable_is_swapped() -> None:
    """The graph reads the addresses that it was captured with: the swap must write there."""
    net = nn.Linear(8, 8, device="cuda")
    ema = ShardedEMA(net, decay=0.5)
    batch = torch.randn(4, 8, device="cuda")
    torch.cuda.make_graphed_callables(net, (batch,))
    assert "swapped()" in ema.serving_mode
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
        ema.update()
        averages = {name: value.cuda() for name, value in ema.full_state_dict().items()}
        live = nn.functional.linear(batch, net.weight, net.bias)
        before = net(batch).clone()
        with ema.swapped():
            inside = net(batch).clone()
        after = net(batch).clone()
    torch.testing.assert_close(before, live)
    torch.testing.assert_close(inside, nn.functional.linear(batch, **averages))
    assert not torch.equal(inside, before)
    assert torch.equal(after, before)
