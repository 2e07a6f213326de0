"""Which calls copy between the device and the host through pinned buffers, and in which dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ema_dist import Offloaded, ShardedEMA, checkpoint
from ema_dist.averages import first_rank, full_weights, track
from ema_dist.checkpoint import saving
from ema_dist.evaluation import serving, swap
from ema_dist.kernels import copy_pairs, copy_to_host
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


class Recorder:
    """Copies as `copy_pairs` does, and keeps the dtypes of each pair and the number of its elements."""

    def __init__(self) -> None:
        self.copied: list[tuple[torch.dtype, torch.dtype, int]] = []

    def __call__(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
        pairs = list(pairs)
        self.copied += [(target.dtype, source.dtype, target.numel()) for target, source in pairs]
        copy_pairs(pairs)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    for module in (first_rank, full_weights, serving, swap, track):
        monkeypatch.setattr(module, "copy_pairs", recorder)
    return recorder


def test_construction_moves_live_weights_in_their_own_dtype(recorder: Recorder) -> None:
    ShardedEMA(nn.Linear(3, 2, bias=False).bfloat16(), store=Offloaded(pin_memory=False))
    assert recorder.copied == [(torch.float32, torch.bfloat16, 6)]


def test_swapped_moves_live_weights_and_averages_in_their_own_dtypes(recorder: Recorder) -> None:
    """A bfloat16 model sends bfloat16 both ways, though its averages are float32."""
    model = nn.Linear(3, 2, bias=False).bfloat16()
    ema = ShardedEMA(model, decay=0.5, store=Offloaded(pin_memory=False))
    live = model.weight.detach().clone()
    recorder.copied.clear()
    with ema.swapped():
        stashed, written_average = recorder.copied
    assert stashed == (torch.bfloat16, torch.bfloat16, 6)
    assert written_average == (torch.bfloat16, torch.float32, 6)
    assert recorder.copied[2] == (torch.bfloat16, torch.bfloat16, 6)
    assert torch.equal(model.weight, live)


def test_a_save_in_the_background_copies_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []

    def recording_copy(tensor: Tensor) -> Tensor:
        copied.append(tensor.numel())
        return copy_to_host(tensor)

    monkeypatch.setattr(saving, "copy_to_host", recording_copy)
    model = nn.Linear(3, 2)
    checkpoint.save({"model": model}, tmp_path, step=1, block=False)
    checkpoint.wait()
    assert sorted(copied) == [2, 6]


def test_only_copies_between_devices_are_recorded(recorder: Recorder) -> None:
    """`meta` is the other device."""
    host, other = torch.zeros(3), torch.empty(3, device="meta")
    full_weights.copy_one(torch.empty(3), host)
    assert not recorder.copied
    full_weights.copy_one(other, host)
    first_rank.contiguous_on(other.device, host)
    assert recorder.copied == [(torch.float32, torch.float32, 3)] * 2


CALLS = ("swapped", "serving", "full_state_dict", "save")
OFFLOADED_CALLS = (*CALLS, "load_full_state_dict", "copy_to", "reset", "deepcopy")


@pytest.mark.gpu
@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    ("call", "is_offloaded", "is_sharded"),
    [
        *[(call, call in ("swapped", "serving"), False) for call in CALLS],
        ("deepcopy", False, True),
        *[(call, True, True) for call in OFFLOADED_CALLS],
    ],
)
def test_on_the_gpu_no_large_copy_is_pageable(
    call: str,
    is_offloaded: bool,  # noqa: FBT001
    is_sharded: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    def make_model() -> nn.Module:
        net = nn.Sequential(nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16))
        return fully_shard(net, mesh=init_device_mesh("cuda", (1,))) if is_sharded else net  # pyrefly: ignore[bad-return]

    model, other_model = make_model(), make_model()
    ema = ShardedEMA(model, decay=0.5, store=Offloaded() if is_offloaded else None)

    def swapped() -> None:
        with ema.swapped():
            pass

    def served() -> None:
        with ema.serving():
            pass

    def save() -> None:
        checkpoint.save({"ema": ema}, tmp_path, step=1, block=False)
        checkpoint.wait()

    calls: dict[str, Callable[[], object]] = {
        "swapped": swapped,
        "serving": served,
        "full_state_dict": ema.full_state_dict,
        "save": save,
        "load_full_state_dict": lambda: ema.load_full_state_dict(full),
        "copy_to": lambda: ema.copy_to(other_model),
        "reset": ema.reset,
        "deepcopy": lambda: copy.deepcopy(ema.state_dict()),
    }
    ema.update()
    full = ema.full_state_dict()
    with torch.profiler.profile() as profile:
        calls[call]()
        torch.cuda.synchronize()
    seconds = {
        kind: sum(event.device_time for event in profile.events() if "Memcpy" in event.name and kind in event.name)
        for kind in ("Pinned", "Pageable")
    }
    assert seconds["Pinned"] > 10 * seconds["Pageable"]  # scalars and tables of addresses are pageable
