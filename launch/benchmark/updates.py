"""What an update costs, by each way to average: time, memory, operators, beside a copy of as many bytes.

The functions that measure run on every rank of a case; times are the slowest rank's, bytes the largest one's.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launch.benchmark.averaging_methods import Averager, AveragingMethod, averaging_methods
from launch.benchmark.cases import DECAY, Case, full, local, nbytes, scale_weights
from launch.benchmark.formulas import ElementSizes, update_bytes
from launch.benchmark.measure import highest, in_turn, peak_memory
from launch.benchmark.operators import count_operators
from launch.recipe.stopwatch import HostStopwatch

COPY = "copy of as many bytes"
NOT_INSTALLED = "not installed"
"""How the failure of a way begins whose package is missing."""
MAX_COPY_BYTES = 512 * 2**20
"""Bytes read and written in one turn of the copy; those of an update of more are counted up from it."""
MEMORY_TURNS = 3
DECAYS = (DECAY, 0.99, 0.9, 0.5)
MethodAndTracks = tuple[str, int]
"""A way to average, and how many tracks it keeps."""


@dataclass(frozen=True)
class UpdateCosts:
    """Of an update of so many tracks; everything by the name of the way to average.

    Args:
        tensors: of the whole model, as `elements`.
        seconds: one a round. First those of the copy: of all bytes that a rank reads and writes if it reads what it
            holds of the live weights once, and reads and writes an average of each of them.
        host_seconds: until the call returns, whatever the device still has to do.
        operators: of torch, views not counted; on a device each is one launch or more.
        moved_bytes: to and from memory, by the formulas of `cost` and `benchmark_peers`.
        held_bytes: of the averages.
        extra_bytes: the most memory during an update, beyond what was resident before.
        failures: how those fail that are not in the others.
    """

    case: Case
    tracks: int
    tensors: int
    elements: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    host_seconds: dict[str, float] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    moved_bytes: dict[str, int] = field(default_factory=dict)
    held_bytes: dict[str, int] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def update_costs(device: torch.device, *, case: Case, repeats: int, tracks: Sequence[int] = (1,)) -> list[UpdateCosts]:
    """For each number of tracks, all in the same rounds."""
    model = case.build_model(device)
    sizes = [parameter.numel() for parameter in model.parameters()]
    costs = {count: UpdateCosts(case, count, len(sizes), sum(sizes)) for count in tracks}
    averagers: dict[MethodAndTracks, Averager] = {}
    for count, name, method in [
        (count, name, method) for count in tracks for name, method in averaging_methods(case).items()
    ]:
        averager = make_or_explain(method.make, model, DECAYS[:count], device)
        if isinstance(averager, str):
            costs[count].failures[name] = averager
        else:
            averagers[name, count] = averager
            _record_counts(costs[count], name, method, averager, device)
    scale_weights(model, factor=1.5)
    _measure_seconds(costs, averagers, model, repeats, device)
    _measure_memory(costs, averagers, model, device)
    for count in tracks:
        assert_averages_close({name: averager for (name, tracks), averager in averagers.items() if tracks == count})
    return list(costs.values())


def make_or_explain(
    make: Callable[[nn.Module, Sequence[float]], Averager],
    model: nn.Module,
    decays: Sequence[float],
    device: torch.device,
) -> Averager | str:
    """The averages after two updates that leave them what they are, since the first may only copy; or how that fails.

    Collective: every rank. What fails on one of them has failed.
    """
    averager, failure, captured = None, "", io.StringIO()
    try:
        with redirect_stdout(captured):
            averager = make(model, decays)
            for _ in range(2):
                averager.update()
        failure = _dtype_failure(averager)
    except ModuleNotFoundError as error:
        failure = f"{NOT_INSTALLED}: {error}"
    except (Exception, SystemExit) as error:  # noqa: BLE001 - however it fails is what the row will say
        message = str(error) if isinstance(error, Exception) else captured.getvalue()
        failure = f"{type(error).__name__}: {(message.splitlines() or [''])[0]}"
    (failed,) = highest([bool(failure)], device)
    return failure or "fails on another rank" if failed or averager is None else averager


def assert_averages_close(averagings: Mapping[str, Averager]) -> None:
    """Whoever computes something else has not taken part.

    Collective: every rank. Raises: AssertionError.
    """
    (first_name, first), *others = averagings.items()
    for name, averager in others:
        for index, track in enumerate(averager.averages()):
            expected = first.averages()[index]
            assert track.keys() == expected.keys(), f"{name} averages other tensors than {first_name}"
            for key, average in track.items():
                _assert_close(average.detach(), expected[key].detach(), f"{name}: {key}")


def _dtype_failure(averager: Averager) -> str:
    wrong_dtypes = {average.dtype for track in averager.averages() for average in track.values()} - {torch.float32}
    return f"no setting for float32 averages: they are {', '.join(map(str, wrong_dtypes))}" if wrong_dtypes else ""


def _record_counts(
    costs: UpdateCosts, name: str, method: AveragingMethod, averager: Averager, device: torch.device
) -> None:
    """What needs no repeating."""
    held = [[local(average) for average in track.values()] for track in averager.averages()]
    elements = sum(average.numel() for average in held[0])
    element_sizes = _element_sizes(costs)
    counts = [
        count_operators(averager.update).count,
        method.bytes_moved(averager, elements, element_sizes),
        sum(nbytes(track) for track in held),
    ]
    counts = [int(count) for count in highest(counts, device)]
    costs.operators[name], costs.moved_bytes[name], costs.held_bytes[name] = counts


def _measure_seconds(
    costs: Mapping[int, UpdateCosts],
    averagers: Mapping[MethodAndTracks, Averager],
    model: nn.Module,
    repeats: int,
    device: torch.device,
) -> None:
    elements = sum(local(parameter).numel() for parameter in model.parameters())
    copies = {count: CopyBaseline(update_bytes(elements, _element_sizes(costs[count])), device) for count in costs}

    def before(key: MethodAndTracks) -> None:
        scale_weights(model, factor=1.0)
        if key[0] == COPY:
            copies[key[1]].warm_source()

    runs: dict[MethodAndTracks, Callable[[], object]] = {(COPY, count): copy.run for count, copy in copies.items()}
    runs |= {key: averager.update for key, averager in averagers.items()}
    seconds = in_turn(runs, before=before, repeats=repeats, device=device)
    for (name, count), samples in seconds.items():
        scale = copies[count].scale if name == COPY else 1
        costs[count].seconds[name] = [scale * sample for sample in highest(samples, device)]


def _measure_memory(
    costs: Mapping[int, UpdateCosts],
    averagers: Mapping[MethodAndTracks, Averager],
    model: nn.Module,
    device: torch.device,
) -> None:
    """Apart from the times: who gave memory back must wait to get it again."""
    memory, host_watch = peak_memory(device), HostStopwatch()
    peak_bytes: dict[MethodAndTracks, list[int]] = {key: [] for key in averagers}
    host_seconds: dict[MethodAndTracks, list[float]] = {key: [] for key in averagers}

    def before(_: MethodAndTracks) -> None:
        scale_weights(model, factor=1.0)
        memory.reset()

    def run(key: MethodAndTracks) -> None:
        with host_watch:
            averagers[key].update()

    def after(key: MethodAndTracks) -> None:
        host_seconds[key].append(host_watch.read())
        peak_bytes[key].append(memory.read())

    runs = {key: partial(run, key) for key in averagers}
    in_turn(runs, before=before, after=after, repeats=MEMORY_TURNS, device=device)
    for (name, count), sizes in peak_bytes.items():
        size, seconds = highest([max(sizes), min(host_seconds[name, count])], device)
        costs[count].extra_bytes[name], costs[count].host_seconds[name] = int(size), seconds


class CopyBaseline:
    """Reads half of `size` bytes from memory and writes the other half, or so many fewer that it still takes memory."""

    def __init__(self, size: int, device: torch.device) -> None:
        elements = max(1, min(size, MAX_COPY_BYTES) // 8)
        self.scale = size / (8 * elements)
        """How many times as long a copy of all bytes takes."""
        self._source, self._target = (torch.zeros(elements, device=device) for _ in range(2))

    def warm_source(self) -> None:
        """Write to the source, as an optimizer does to live weights."""
        self._source.mul_(1.0)

    def run(self) -> None:
        self._target.copy_(self._source)


def _element_sizes(costs: UpdateCosts) -> ElementSizes:
    return replace(costs.case.element_sizes, tracks=costs.tracks)


def _assert_close(average: Tensor, expected: Tensor, what: str) -> None:
    placements = [tensor.placements if isinstance(tensor, DTensor) else None for tensor in (average, expected)]
    comparable = (
        local if placements[0] == placements[1] else full
    )  # nothing to send where each rank can compare what it has
    average, expected = comparable(average), comparable(expected)
    if comparable is local or dist.get_rank() == 0:
        torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6, msg=lambda message: f"{what}: {message}")
