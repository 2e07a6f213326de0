"""Which kernel is selected, and the warnings about it."""

from __future__ import annotations

import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ema_dist import ShardedEMA
from ema_dist.kernels import (
    KERNELS,
    CompensatedRounding,
    Rounding,
    StochasticRounding,
    TensorOffset,
    make_kernel,
    scratch,
    selection,
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets one entry for each measurement."""
    calls: list[int] = []
    original = selection._seconds  # noqa: SLF001

    def seconds(*args: object) -> float:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(selection, "_seconds", seconds)
    monkeypatch.setattr(scratch, "CPU_SCRATCH_BYTES", 8)  # three elements are more than one chunk
    selection._fastest.cache_clear()  # noqa: SLF001
    return calls


def ones(count: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    return [[torch.ones(3, dtype=dtype)] for _ in range(count)]


def test_a_workload_is_measured_once_in_a_process(measured: list[int]) -> None:
    values = [torch.zeros(3)]
    first = make_kernel(ones(2), values)
    count = len(measured)
    assert count > 1
    assert make_kernel(ones(2), [torch.zeros(3)]).name == first.name
    assert len(measured) == count
    make_kernel(ones(3), values)
    assert len(measured) == 2 * count


def test_the_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch, measured: list[int]) -> None:  # noqa: ARG001
    for fastest in ("foreach", "scratch"):
        selection._fastest.cache_clear()  # noqa: SLF001
        monkeypatch.setattr(selection, "_seconds", lambda lerp, *_, best=fastest: float(lerp.name != best))
        assert make_kernel(ones(2), [torch.zeros(3)]).name == fastest


@pytest.mark.world_size(3)
def test_ranks_agree_on_a_kernel() -> None:
    """Two kernels may differ in the last bit: replicas that hold full averages would drift apart, and runs differ."""
    best = ["foreach", "scratch"][dist.get_rank() % 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "CPU_SCRATCH_BYTES", 8)
        patch.setattr(selection, "_seconds", lambda lerp, *_: float(lerp.name != best))
        assert make_kernel(ones(2), [torch.zeros(3)]).name == best
        decays = {"short": 0.5, "long": 0.9}
        replicated = ShardedEMA(DistributedDataParallel(nn.Linear(2, 2)), decay=decays, replicas="copy")
        sharded = ShardedEMA(fully_shard(nn.Linear(12, 12), mesh=init_device_mesh("cpu", (3,))), decay=decays)
        summaries = [repr(replicated), repr(sharded)]
    kernels = re.findall("update_kernel=([a-z]+),", " ".join(summaries))
    kernels_by_rank: list[list[str]] = [[]] * 3
    dist.all_gather_object(kernels_by_rank, kernels)
    assert kernels_by_rank == [kernels] * 3


@pytest.mark.world_size(2)
def test_ranks_with_uneven_shards_agree_on_a_kernel() -> None:
    """Two rows on one rank and one on the other. Each rank may also hold some parameters in full."""
    best = ["foreach", "scratch"][dist.get_rank()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "CPU_SCRATCH_BYTES", 8)
        patch.setattr(selection, "_seconds", lambda lerp, *_: float(lerp.name != best))
        model = fully_shard(nn.Linear(8, 3), mesh=init_device_mesh("cpu", (2,)))
        kernel = ShardedEMA(model, decay={"short": 0.5, "long": 0.9}).update_kernel
    kernels_by_rank = [""] * 2
    dist.all_gather_object(kernels_by_rank, kernel)
    assert kernels_by_rank == [kernel] * 2


def test_nothing_is_measured_where_there_is_no_choice(measured: list[int]) -> None:
    assert make_kernel(ones(1), [torch.zeros(3)]).name == "foreach"
    assert make_kernel([[torch.ones(2)]] * 2, [torch.zeros(2)]).name == "foreach"  # one chunk
    assert make_kernel([[torch.ones(0)]] * 2, [torch.zeros(0)]).name == "foreach"  # a rank may hold nothing
    assert make_kernel(ones(4), [torch.zeros(3, dtype=torch.bfloat16)]).name == "scratch"
    assert make_kernel(ones(2), [torch.zeros(3)], kernel="foreach").name == "foreach"
    assert not measured


def test_measuring_leaves_the_averages_alone(measured: list[int]) -> None:
    tracks = ones(2)
    make_kernel(tracks, [torch.zeros(3)])
    assert measured
    assert all(torch.equal(average, torch.ones(3)) for (average,) in tracks)


def test_an_unknown_kernel_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"{', '.join(KERNELS)}.*None.*'fast'"):
        make_kernel(ones(1), [torch.zeros(3)], kernel="fast")


def test_an_unusable_kernel_is_replaced_with_a_warning() -> None:
    """The ``name`` is that of the kernel that runs."""
    tracks = ones(1)
    with pytest.warns(UserWarning, match=r"kernel='foreach'.*'scratch'.*torch\.float32.*torch\.bfloat16"):
        lerp = make_kernel(tracks, [torch.zeros(3, dtype=torch.bfloat16)], kernel="foreach")
    assert lerp.name == "scratch"
    lerp([0.5])
    assert torch.equal(tracks[0][0], torch.full((3,), 0.5))


def test_the_warning_says_that_the_kernel_was_chosen_by_speed(measured: list[int]) -> None:  # noqa: ARG001
    with pytest.warns(UserWarning, match="'triton'.*fastest.*'foreach'"):
        lerp = make_kernel(ones(2), [torch.zeros(3)], agree=lambda _question, _answer: "triton")
    assert lerp.name == "foreach"


@pytest.mark.parametrize(
    "rounding", [StochasticRounding([TensorOffset(0)]), CompensatedRounding([[torch.zeros(3).short()]])]
)
def test_kernels_are_measured_with_their_rounding(rounding: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding takes ten to twenty times as many bytes and launches as the same kernel without it."""
    tracks, values = ones(1, torch.bfloat16), [torch.ones(3)]
    workload = selection._Workload.from_tensors(tracks, values, finite=True, rounding=rounding)  # noqa: SLF001
    measured_kernels: list[object] = []
    monkeypatch.setattr(selection, "_seconds", lambda lerp, *_: float(measured_kernels.append(type(lerp)) or 0))
    selection._measure_fastest(workload, ("scratch", "triton"))  # noqa: SLF001
    assert {*measured_kernels} == {type(make_kernel(tracks, values, kernel="scratch", rounding=rounding))}


@pytest.mark.parametrize(("device", "limit"), [("cpu", 2**24), ("cuda:1", 2**26)])
def test_workloads_are_of_a_device_and_bounded(device: str, limit: int) -> None:
    large: Any = SimpleNamespace(device=torch.device(device), dtype=torch.float32, numel=lambda: 2**30 + 1)
    workload = selection._Workload.from_tensors([[large]], [large], finite=True, rounding=None)  # noqa: SLF001
    assert (workload.elements, workload.device) == (limit, torch.device(device))


def test_on_a_device_several_calls_are_timed_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("event")

        def synchronize(self) -> None:
            told.append("wait")

        def elapsed_time(self, _: Event) -> float:
            return 8.0

    module = SimpleNamespace(Event=Event, device=lambda device: nullcontext(told.append(str(device))))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    kernel: Any = lambda weights: told.append(str(weights))  # noqa: E731
    seconds = selection._seconds(kernel, 1, torch.device("cuda", 1))  # noqa: SLF001
    assert told == ["cuda:1", "[0.5]", "event", *["[0.5]"] * selection.TIMED_CALLS, "event", "wait"]
    assert seconds == pytest.approx(0.008 / selection.TIMED_CALLS)


def test_ranks_of_a_machine_ask_one_question(measured: list[int]) -> None:  # noqa: ARG001
    """Their devices have different indices."""
    questions: list[str] = []
    make_kernel(ones(2), [torch.zeros(3)], agree=lambda question, answer: questions.append(question) or answer)
    assert "index=" not in questions[0]
    assert "device(type='cpu')" in questions[0]


def test_where_memory_is_short_fewer_elements_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_elements: list[int] = []

    def measure(workload: Any, names: tuple[str, ...]) -> str:  # noqa: ANN401
        measured_elements.append(workload.elements)
        if workload.elements > 2**22:
            raise torch.OutOfMemoryError
        return names[-1]

    selection._fastest.cache_clear()  # noqa: SLF001
    monkeypatch.setattr(selection, "_measure_fastest", measure)
    workload = selection._Workload(torch.device("cuda", 0), torch.float32, (torch.float32,), False, 2**26, True)  # noqa: FBT003, SLF001
    assert selection._fastest(workload, ("scratch", "triton")) == "triton"  # noqa: SLF001
    assert measured_elements == [2**26, 2**24, 2**22]


def test_without_memory_to_measure_the_first_possible_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out_of_memory(*_: object) -> float:
        raise torch.OutOfMemoryError

    selection._fastest.cache_clear()  # noqa: SLF001
    monkeypatch.setattr(selection, "_seconds", run_out_of_memory)
    monkeypatch.setattr(scratch, "CPU_SCRATCH_BYTES", 8)
    assert make_kernel(ones(2), [torch.zeros(3)]).name == "foreach"
