"""Measures an update by each averaging method: its time, compared with a copy of as many bytes, memory and operators.

Functions named `..._costs` run on every rank of a case. Times and bytes are maxima over ranks.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launch.benchmark.averaging_methods import OURS, OURS_AUTO, OURS_COPY, Averager, Make, averaging_methods
from launch.benchmark.cases import DECAY, Case, full, local, nbytes, scale_weights
from launch.benchmark.formulas import ElementSizes, update_bytes
from launch.benchmark.measure import InterleavedCalls, Record, Samples, highest, highest_by_key, times_reference
from launch.benchmark.operators import count_operators

COPY = "copy of as many bytes"
NOT_INSTALLED = "not installed"
"""The beginning of the failure text of a method whose package is missing."""
MAX_COPY_BYTES = 512 * 2**20
"""The most bytes that one run of the copy reads and writes; times of more bytes are extrapolated."""
DECAYS = (DECAY, 0.99, 0.9, 0.5)
MethodAndTracks = tuple[str, int]
"""The name of an averaging method, and its number of tracks."""


class CopyBaseline:
    """Copies `size / 2` bytes, so that `size` bytes are read or written in total; at most `MAX_COPY_BYTES`."""

    def __init__(self, size: int, device: torch.device) -> None:
        elements = max(1, min(size, MAX_COPY_BYTES) // 8)
        self._scale = size / (8 * elements)
        self._source, self._target = (torch.zeros(elements, device=device) for _ in range(2))

    def warm_source(self) -> None:
        """Write to the source, as an optimizer does to live weights."""
        self._source.mul_(1.0)

    def run(self) -> None:
        self._target.copy_(self._source)

    def scaled(self, seconds: Sequence[float]) -> list[float]:
        """Extrapolates times to a copy of all bytes."""
        return [self._scale * sample for sample in seconds]


def update_costs(device: torch.device, *, case: Case, repeats: int, tracks: Sequence[int] = (1,)) -> list[Record]:
    """A record for each number of tracks, all measured in the same rounds.

    The first entry of `seconds` is a copy of as many bytes as an update moves that averages all live weights on the
    rank, and reads them once for all tracks. `moved_bytes` are the bytes that the operators of an update read and
    write; if an `Averager` shares the reads of live weights, they come from the formula, which `launch.cost` checks.
    `failures` has the messages of the methods that failed; the other entries lack these methods.
    """
    model = case.build_model(device)
    records: dict[int, Record] = {}
    averagers: dict[MethodAndTracks, Averager] = {}
    copies: dict[int, CopyBaseline] = {}
    sizes = [parameter.numel() for parameter in model.parameters()]
    live_weights = [local(parameter.detach()) for parameter in model.parameters()]
    by_method = ("seconds", "host_seconds", "operators", "moved_bytes", "held_bytes", "extra_bytes", "failures")
    for count in tracks:
        record: Record = {"case": case, "tracks": count, "tensors": len(sizes), "elements": sum(sizes)}
        for key in by_method:
            record[key] = {}
        records[count] = record
        element_sizes = replace(case.element_sizes, tracks=count)
        copies[count] = CopyBaseline(update_bytes(sum(live.numel() for live in live_weights), element_sizes), device)
        for name, make in averaging_methods(case).items():
            averager = make_or_describe_failure(make, model, DECAYS[:count], device)
            if isinstance(averager, str):
                record["failures"][name] = averager
                continue
            averagers[name, count] = averager
            is_ours = name in {OURS, OURS_AUTO, OURS_COPY}
            numbers = update_numbers(averager, live_weights, element_sizes, scratch_in_cache=is_ours)
            for key, number in highest_by_key(numbers, device).items():
                record[key][name] = number
    scale_weights(model, factor=1.5)
    updates = {key: averager.update for key, averager in averagers.items()}
    timed, in_memory_rounds = _measure(updates, copies, model, device, repeats)
    for (name, count), seconds in timed.seconds.items():
        records[count]["seconds"][name] = copies[count].scaled(seconds) if name == COPY else seconds
    for name, count in averagers:
        records[count]["host_seconds"][name] = in_memory_rounds.host_seconds[name, count]
        records[count]["extra_bytes"][name] = in_memory_rounds.extra_bytes[name, count]
    for count, record in records.items():
        record["times_reference"] = times_reference(record["seconds"])
        _assert_averages_close({name: averager for (name, own), averager in averagers.items() if own == count})
    return [*records.values()]


def _measure(
    updates: dict[MethodAndTracks, Callable[[], object]],
    copies: Mapping[int, CopyBaseline],
    model: nn.Module,
    device: torch.device,
    repeats: int,
) -> tuple[Samples[MethodAndTracks], Samples[MethodAndTracks]]:
    """Times of updates and copies; and memory of updates, from separate rounds."""

    def before(key: MethodAndTracks) -> None:
        scale_weights(model, factor=1.0)
        if key[0] == COPY:
            copies[key[1]].warm_source()

    copy_runs: dict[MethodAndTracks, Callable[[], object]] = {(COPY, count): it.run for count, it in copies.items()}
    timed = InterleavedCalls(copy_runs | updates, device, before).measure(repeats)
    return timed, InterleavedCalls(updates, device, before).measure_memory()


def update_numbers(
    averager: Averager, live_weights: Sequence[Tensor], element_sizes: ElementSizes, *, scratch_in_cache: bool
) -> dict[str, int]:
    """The results that need no repetition. With `scratch_in_cache`, accesses to temporary buffers move no bytes."""
    held = [[local(average) for average in track.values()] for track in averager.averages()]
    tensors = [*live_weights, *chain.from_iterable(held)] if scratch_in_cache else None
    operators = count_operators(averager.update, tensors=tensors)
    formula = update_bytes(sum(average.numel() for average in held[0]), element_sizes)
    return {
        "operators": operators.count,
        "moved_bytes": formula if averager.shares_live_reads else operators.bytes_moved,
        "held_bytes": sum(map(nbytes, held)),
    }


def make_or_describe_failure(
    make: Make, model: nn.Module, decays: Sequence[float], device: torch.device, *, swap: bool = False
) -> Averager | str:
    """The averages after two updates that do not change them (the first may only copy), or how the method fails.

    Collective: every rank. A method that fails on one rank counts as failed on all. With `swap`, swapping is tried too.
    """
    averager, failure, captured = None, "", io.StringIO()
    try:
        with redirect_stdout(captured):
            averager = make(model, decays)
            for _ in range(2):
                averager.update()
            with averager.swapped() if swap and averager.swapped else nullcontext():
                pass
        dtypes = {average.dtype for track in averager.averages() for average in track.values()} - {torch.float32}
        failure = f"no setting for float32 averages: they are {', '.join(map(str, dtypes))}" if dtypes else ""
    except ModuleNotFoundError as error:
        failure = f"{NOT_INSTALLED}: {error}"
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the row shows any failure
        message = str(error) if isinstance(error, Exception) else captured.getvalue()
        failure = f"{type(error).__name__}: {(message.splitlines() or [''])[0]}"
    (failed,) = highest([bool(failure)], device)
    return failure or "fails on another rank" if failed or averager is None else averager


def _assert_averages_close(averagers: Mapping[str, Averager]) -> None:
    """Fail the run if the methods' averages differ. Collective: every rank."""
    (first_name, first), *others = averagers.items()
    for name, averager in others:
        for expected, track in zip(first.averages(), averager.averages(), strict=True):
            assert track.keys() == expected.keys(), f"{name} averages other tensors than {first_name}"
            for key, average in track.items():
                _assert_close(average.detach(), expected[key].detach(), f"{name}: {key}")


def _assert_close(average: Tensor, expected: Tensor, what: str) -> None:
    placements = [tensor.placements if isinstance(tensor, DTensor) else None for tensor in (average, expected)]
    comparable = local if placements[0] == placements[1] else full  # local parts are compared without communication
    average, expected = comparable(average), comparable(expected)
    if comparable is local or dist.get_rank() == 0:
        # An update rounds each average once or twice, by at most half an eps, and keeps DECAY of the earlier errors.
        tolerance = 2 * torch.finfo(torch.float32).eps / (1 - DECAY)
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(
            average, expected, rtol=tolerance, atol=tolerance * largest, msg=lambda message: f"{what}: {message}"
        )
