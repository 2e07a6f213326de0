"""Whatever interrupts a swap, once `restore` returns, live weights and averages are bit-identical to what they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ema_dist import Compensated, HalfLife, ShardedEMA
from ema_dist.averages.live_model import LiveModel
from ema_dist.evaluation import swap
from ema_dist.kernels import scratch
from ema_dist.sharding import Shard, has_equal_bits
from tests.support.interrupter import Interrupter, Interruption
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, averages_of_tracks

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


WRITING = ("evaluation/swap.py", "evaluation/model_with_averages.py", "kernels/exchange.py")
"""The modules whose bytecodes are interrupted."""

WRITING_SPLIT = (*WRITING, "evaluation/split_swap.py", "evaluation/block.py")
SERVING = ("evaluation/*.py", "sharding/substitution.py", "sharding/registries.py", "sharding/fsdp2.py")


class _Net(nn.Module):
    """Tensors of two dtypes, of which one takes several scratches, and buffers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.randn(20, 5).to(dtype))
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.register_buffer("mean", torch.tensor([float("nan"), 1.0, 2.1, 3.0], dtype=dtype))
        self.register_buffer("count", torch.tensor(7))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": nn.Module.train,
    "ddp": DistributedDataParallel,
    "fsdp2": fully_shard,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "equal dtypes": {},
    "different dtypes": {},
    "hi/lo": {"dtype": torch.bfloat16, "rounding": Compensated()},
    "two tracks": {"decay": {"a": 0.5, "b": HalfLife(0.5)}},
}


@pytest.mark.world_size(1, timeout=600)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_exception_at_any_bytecode_loses_nothing(
    wrapper: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entering, leaving and restoring, and again while the first interruption is being handled."""
    monkeypatch.setattr(scratch, "CPU_SCRATCH_BYTES", 256)
    torch.manual_seed(0)
    model = WRAPPERS[wrapper](_Net(torch.float32 if setting in ("equal dtypes", "two tracks") else torch.bfloat16))
    ema = ShardedEMA(model, **{"decay": 0.5} | SETTINGS[setting])
    with torch.no_grad():
        for tensor in (*model.parameters(), model.get_buffer("mean") if wrapper != "ddp" else model.module.mean):
            tensor.add_(1)
    ema.update()
    track = ema.tracks[-1]
    live, averages = _live(model), averages_of_tracks(ema)

    swap_in_and_out = partial(_swap_in_and_out, ema, track)
    counter, leaving = Interrupter(WRITING), Interrupter(WRITING)
    counter.run(swap_in_and_out)
    block = ema.swapped(track)
    block.__enter__()
    leaving.run(ema.restore)
    random.seed(0)
    twice = interrupted_restores = 0
    for point in range(1, counter.count + 1):
        swap_interrupter = Interrupter(WRITING, point, point + random.randint(1, leaving.count))
        swap_interrupter.run(swap_in_and_out)
        restore_interrupter = Interrupter(WRITING, random.randint(1, leaving.count))
        restore_interrupter.run(ema.restore)
        twice += swap_interrupter.raised == 2
        interrupted_restores += restore_interrupter.raised
        ema.restore()
        _assert_same(_live(model), live, point)
        if point % 10 == 0:
            _assert_same(averages_of_tracks(ema), averages, point)
            swap_in_and_out()
            _assert_same(_live(model), live, point)
    _assert_same(averages_of_tracks(ema), averages, counter.count)
    assert min(twice, interrupted_restores) > counter.count / 10, (counter.count, twice, interrupted_restores)
    ema.update()


@pytest.mark.world_size(2, timeout=600)
def test_an_exception_on_one_of_two_ranks_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where replicas split averages: at 150 bytecodes of rank 0, outside of collectives."""
    monkeypatch.setattr(scratch, "CPU_SCRATCH_BYTES", 256)
    points = _points_outside_collectives(monkeypatch)
    for point in points[:: len(points) // 150]:
        model, ema = _make_split(timeout=0.5)
        live, averages = _live(model), averages_of_tracks(ema)
        interrupter = Interrupter(WRITING_SPLIT, *([point] if dist.get_rank() == 0 else []))
        with contextlib.suppress(RuntimeError):  # of the rank that is not interrupted
            interrupter.run(partial(_swap_in_and_out, ema))
        assert interrupter.raised == (dist.get_rank() == 0)
        dist.barrier()
        ema.restore()
        _assert_same(_live(model), live, point)
        _assert_same(averages_of_tracks(ema), averages, point)
        ema.update()
        _swap_in_and_out(ema)


def _points_outside_collectives(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytecodes of a swap, without those from a rendezvous to the end of the collective after it.

    There the other rank waits in the collective, which only the process group can end.
    """
    _, ema = _make_split()
    counter = Interrupter(WRITING_SPLIT)
    last_rendezvous = 0
    excluded: set[int] = set()

    def after(function: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            result = function(*args, **kwargs)
            note()
            return result

        return call

    def note_rendezvous() -> None:
        nonlocal last_rendezvous
        last_rendezvous = counter.count

    def exclude() -> None:
        excluded.update(range(last_rendezvous, counter.count + 10))

    prepare_fill = swap.prepare_all_gather_parts
    with monkeypatch.context() as patched:
        patched.setattr(LiveModel, "rendezvous", after(LiveModel.rendezvous, note_rendezvous))
        patched.setattr(LiveModel, "describe_drift", after(LiveModel.describe_drift, exclude))
        patched.setattr(swap, "prepare_all_gather_parts", lambda shards: after(prepare_fill(shards), exclude))
        counter.run(partial(_swap_in_and_out, ema))
    assert len(excluded) < counter.count / 10
    return [point for point in range(1, counter.count + 1) if point not in excluded]


@pytest.mark.world_size(2)
@pytest.mark.parametrize("leaving", [False, True])
def test_an_exception_while_replicas_fill_each_other_is_announced(
    leaving: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rank cannot know what the other one has of its weights: no later call of either goes on as if nothing was."""
    _, ema = _make_split(timeout=30.0)
    block = ema.swapped()
    if leaving:
        block.__enter__()
    prepare_fill = swap.prepare_all_gather_parts

    def fill_and_fail(shards: Iterable[Shard]) -> Callable[[], None]:
        fill = prepare_fill(shards)

        def run() -> None:
            fill()
            raise Interruption

        return run

    if dist.get_rank() == 0:
        monkeypatch.setattr(swap, "prepare_all_gather_parts", fill_and_fail)
        with pytest.raises(Interruption):
            block.__exit__(None, None, None) if leaving else block.__enter__()
    elif leaving:
        block.__exit__(None, None, None)
    else:
        block.__enter__()
    for call in (ema.restore, ema.full_state_dict, ema.state_dict, ema.full_state_dict):
        if call == ema.restore and leaving and dist.get_rank() == 1:
            continue
        with pytest.raises(RuntimeError, match=r"Interruption.*rank 0.*[Rr]estart from a checkpoint"):
            call()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("leaving", [False, True])
def test_a_rank_without_memory_for_filling_loses_nothing(leaving: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """Its scratch is allocated before ranks overwrite each other's weights, so all can undo what they did, or go on."""
    model, ema = _make_split(timeout=30.0)
    live, averages = _live(model), averages_of_tracks(ema)
    own_error, error_elsewhere = pytest.raises(MemoryError), pytest.raises(RuntimeError, match=r"rank 0\b.*MemoryError")
    block = ema.swapped()
    if leaving:
        block.__enter__()
    with monkeypatch.context() as patched, own_error if dist.get_rank() == 0 else error_elsewhere:
        if dist.get_rank() == 0:
            patched.setattr(swap, "prepare_all_gather_parts", _raise_memory_error)
        block.__exit__(None, None, None) if leaving else block.__enter__()
    if leaving:
        ema.restore()
    _assert_same(_live(model), live, 0)
    _assert_same(averages_of_tracks(ema), averages, 0)
    _swap_in_and_out(ema)


def _raise_memory_error(_shards: Iterable[Shard]) -> Callable[[], None]:
    raise MemoryError


@pytest.mark.world_size(1, timeout=600)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_exception_at_any_bytecode_of_serving_leaves_no_average_in_the_forward_pass(wrapper: str) -> None:
    torch.manual_seed(0)
    model = WRAPPERS[wrapper](nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    ema = ShardedEMA(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()
    live, averages, inputs = _live(model), averages_of_tracks(ema), torch.randn(4, 3)
    model.eval()
    expected = model(inputs).detach()

    def serve() -> None:
        with ema.serving():
            pass

    serve()
    counter = Interrupter(SERVING)
    counter.run(serve)
    random.seed(0)
    twice = interrupted_restores = 0
    for point in range(1, counter.count + 1, counter.count // 200):
        serving_interrupter = Interrupter(SERVING, point, point + random.randint(1, counter.count // 4))
        serving_interrupter.run(serve)
        restore_interrupter = Interrupter(SERVING, random.randint(1, counter.count // 4))
        restore_interrupter.run(ema.restore)
        twice += serving_interrupter.raised == 2
        interrupted_restores += restore_interrupter.raised
        ema.restore()
        assert torch.equal(model(inputs), expected), f"bytecode {point}"
        _assert_same(_live(model), live, point)
    assert min(twice, interrupted_restores) > 10, (counter.count, twice, interrupted_restores)
    with ema.serving():
        assert not torch.equal(model(inputs), expected)
    _assert_same(averages_of_tracks(ema), averages, counter.count)
    torch.set_grad_enabled(True)  # an interrupted `with torch.no_grad()` may leave it off
    model(inputs).sum().backward()
    ema.update()


def _make_split(**settings: Any) -> tuple[nn.Module, ShardedEMA]:  # noqa: ANN401
    torch.manual_seed(0)
    model = DistributedDataParallel(_Net(torch.float32))
    ema = ShardedEMA(model, **{"decay": 0.5} | settings)
    with torch.no_grad():
        model.module.large.add_(1)
    ema.update()
    return model, ema


def _swap_in_and_out(ema: ShardedEMA, track: str | None = None) -> None:
    with ema.swapped(track):
        pass


def _live(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.to_local() if hasattr(value, "to_local") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], point: int) -> None:
    assert [n for n, value in expected.items() if not has_equal_bits(actual[n], value)] == [], f"bytecode {point}"
