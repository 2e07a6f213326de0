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

from launch.benchmark.cases import DECAY, Case, change_weights, full, local, nbytes
from launch.benchmark.formulas import Kept, update_bytes
from launch.benchmark.measure import highest, in_turn, peak_memory
from launch.benchmark.operators import operators_in
from launch.benchmark.peers import Averaging, Way, ways
from launch.recipe.stopwatch import HostStopwatch

COPY = "copy of as many bytes"
NOT_INSTALLED = "not installed"
"""How the failure of a way begins whose package is missing."""
LARGEST_COPY = 512 * 2**20
"""Bytes read and written in one turn of the copy; those of an update of more are counted up from it."""
MEMORY_TURNS = 3
DECAYS = (DECAY, 0.99, 0.9, 0.5)
Key = tuple[str, int]
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
    model = case.wrapped(device)
    sizes = [parameter.numel() for parameter in model.parameters()]
    costs = {count: UpdateCosts(case, count, len(sizes), sum(sizes)) for count in tracks}
    found: dict[Key, Averaging] = {}
    for count, name, way in [(count, name, way) for count in tracks for name, way in ways(case).items()]:
        made = attempt(way.make, model, DECAYS[:count], device)
        if isinstance(made, str):
            costs[count].failures[name] = made
        else:
            found[name, count] = made
            _count(costs[count], name, way, made, device)
    change_weights(model, factor=1.5)
    _measure_seconds(costs, found, model, repeats, device)
    _measure_memory(costs, found, model, device)
    for count in tracks:
        require_alike({name: averaging for (name, tracks), averaging in found.items() if tracks == count})
    return list(costs.values())


def attempt(
    make: Callable[[nn.Module, Sequence[float]], Averaging],
    model: nn.Module,
    decays: Sequence[float],
    device: torch.device,
) -> Averaging | str:
    """The averages after two updates that leave them what they are, since the first may only copy; or how that fails.

    Collective: every rank. What fails on one of them has failed.
    """
    made, failure, printed = None, "", io.StringIO()
    try:
        with redirect_stdout(printed):
            made = make(model, decays)
            for _ in range(2):
                made.update()
        failure = _not_in_float32(made)
    except ModuleNotFoundError as error:
        failure = f"{NOT_INSTALLED}: {error}"
    except (Exception, SystemExit) as error:  # noqa: BLE001 - however it fails is what the row will say
        said = str(error) if isinstance(error, Exception) else printed.getvalue()
        failure = f"{type(error).__name__}: {(said.splitlines() or [''])[0]}"
    (failed,) = highest([bool(failure)], device)
    return failure or "fails on another rank" if failed or made is None else made


def require_alike(averagings: Mapping[str, Averaging]) -> None:
    """Whoever computes something else has not taken part.

    Collective: every rank. Raises: AssertionError.
    """
    (first_name, first), *others = averagings.items()
    for name, averaging in others:
        for place, track in enumerate(averaging.averages()):
            expected = first.averages()[place]
            assert track.keys() == expected.keys(), f"{name} averages other tensors than {first_name}"
            for key, average in track.items():
                _require_close(average.detach(), expected[key].detach(), f"{name}: {key}")


def _not_in_float32(averaging: Averaging) -> str:
    others = {average.dtype for track in averaging.averages() for average in track.values()} - {torch.float32}
    return f"no setting for float32 averages: they are {', '.join(map(str, others))}" if others else ""


def _count(costs: UpdateCosts, name: str, way: Way, averaging: Averaging, device: torch.device) -> None:
    """What needs no repeating."""
    held = [[local(average) for average in track.values()] for track in averaging.averages()]
    elements = sum(average.numel() for average in held[0])
    kept = _kept(costs)
    counts = [
        operators_in(averaging.update).count,
        way.bytes_moved(averaging, elements, kept),
        sum(nbytes(track) for track in held),
    ]
    counts = [int(count) for count in highest(counts, device)]
    costs.operators[name], costs.moved_bytes[name], costs.held_bytes[name] = counts


def _measure_seconds(
    costs: Mapping[int, UpdateCosts],
    found: Mapping[Key, Averaging],
    model: nn.Module,
    repeats: int,
    device: torch.device,
) -> None:
    elements = sum(local(parameter).numel() for parameter in model.parameters())
    copies = {count: Copy(update_bytes(elements, _kept(costs[count])), device) for count in costs}

    def before(key: Key) -> None:
        change_weights(model, factor=1.0)
        if key[0] == COPY:
            copies[key[1]].warm()

    runs: dict[Key, Callable[[], object]] = {(COPY, count): copy.run for count, copy in copies.items()}
    runs |= {key: averaging.update for key, averaging in found.items()}
    seconds = in_turn(runs, before=before, repeats=repeats, device=device)
    for (name, count), samples in seconds.items():
        scale = copies[count].scale if name == COPY else 1
        costs[count].seconds[name] = [scale * sample for sample in highest(samples, device)]


def _measure_memory(
    costs: Mapping[int, UpdateCosts], found: Mapping[Key, Averaging], model: nn.Module, device: torch.device
) -> None:
    """Apart from the times: who gave memory back must wait to get it again."""
    memory, host = peak_memory(device), HostStopwatch()
    taken: dict[Key, list[int]] = {key: [] for key in found}
    host_seconds: dict[Key, list[float]] = {key: [] for key in found}

    def before(_: Key) -> None:
        change_weights(model, factor=1.0)
        memory.reset()

    def run(key: Key) -> None:
        with host:
            found[key].update()

    def after(key: Key) -> None:
        host_seconds[key].append(host.read())
        taken[key].append(memory.read())

    runs = {key: partial(run, key) for key in found}
    in_turn(runs, before=before, after=after, repeats=MEMORY_TURNS, device=device)
    for (name, count), sizes in taken.items():
        size, seconds = highest([max(sizes), min(host_seconds[name, count])], device)
        costs[count].extra_bytes[name], costs[count].host_seconds[name] = int(size), seconds


class Copy:
    """Reads half of `size` bytes from memory and writes the other half, or so many fewer that it still takes memory."""

    def __init__(self, size: int, device: torch.device) -> None:
        elements = max(1, min(size, LARGEST_COPY) // 8)
        self.scale = size / (8 * elements)
        """How many times as long a copy of all bytes takes."""
        self._source, self._target = (torch.zeros(elements, device=device) for _ in range(2))

    def warm(self) -> None:
        """Write to the source, as an optimizer does to live weights."""
        self._source.mul_(1.0)

    def run(self) -> None:
        self._target.copy_(self._source)


def _kept(costs: UpdateCosts) -> Kept:
    return replace(costs.case.kept, tracks=costs.tracks)


def _require_close(average: Tensor, expected: Tensor, what: str) -> None:
    cuts = [tensor.placements if isinstance(tensor, DTensor) else None for tensor in (average, expected)]
    whole = local if cuts[0] == cuts[1] else full  # nothing to send where each rank can compare what it has
    average, expected = whole(average), whole(expected)
    if whole is local or dist.get_rank() == 0:
        torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6, msg=lambda found: f"{what}: {found}")
