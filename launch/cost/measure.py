"""What the averages of one model take on each rank, measured, beside what the formulas of `cost.py` say."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from launch.benchmark.cases import Case, change_weights, local, nbytes
from launch.benchmark.formulas import Spread, average_bytes, average_elements, swap_network_bytes, update_bytes
from launch.benchmark.measure import highest, in_turn, peak_memory
from launch.benchmark.operators import operators_in
from launch.benchmark.peers import ours
from launch.benchmark.updates import DECAYS, Copy

COPY, UPDATE = "copy", "update"


@dataclass(frozen=True)
class Checked:
    """A number by formula and measured, one for each rank."""

    formula: list[int]
    measured: list[int]

    @property
    def differ_by(self) -> float:
        """The largest difference on a rank, as a part of what the formula says of the first."""
        differences = (abs(found - said) for said, found in zip(self.formula, self.measured, strict=True))
        return max(differences) / max(1, self.formula[0])


@dataclass(frozen=True)
class CostCheck:
    """One model in one layout.

    Args:
        elements: of the whole model.
        held: bytes of the averages.
        moved: bytes of live weights and averages that an update reads and writes.
        sent: bytes that pass a rank's network when a swap begins.
        sent_by_update: bytes that pass it in an update, the most of all ranks.
        grown: bytes by which the process grew when the averages were made, the most of all ranks.
        seconds: of updates, one a round, of the slowest rank; `seconds_copy` those of a copy of as many bytes.
    """

    case: Case
    spread: Spread
    tracks: int
    elements: int
    held: Checked
    moved: Checked
    sent: Checked
    sent_by_update: int
    grown: int
    seconds: list[float]
    seconds_copy: list[float]


def costs(device: torch.device, *, case: Case, split: bool, tracks: int, repeats: int) -> CostCheck:
    model = case.wrapped(device)
    spread, kept = spread_of(case, split=split), replace(case.kept, tracks=tracks)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    memory = peak_memory(device)
    memory.reset()
    ema = ours(model, DECAYS[:tracks], "shard" if split else "copy")
    grown = memory.read()
    averages = [local(average) for track in ema.averages() for average in track.values()]
    lives = [local(parameter.detach()) for parameter in model.parameters()]
    update = operators_in(ema.update, of=[*lives, *averages])
    ranks = range(case.ranks)
    elements = [average_elements(shapes, spread, rank) for rank in ranks]
    seconds = _seconds(model, ema.update, update_bytes(elements[dist.get_rank()], kept), repeats, device)
    assert ema.swapped is not None
    swap = ema.swapped()
    sent = operators_in(swap.__enter__).bytes_sent
    swap.__exit__(None, None, None)
    sent_by_update, grown = (int(most) for most in highest([update.bytes_sent, grown], device))
    return CostCheck(
        case,
        spread,
        tracks,
        sum(map(math.prod, shapes)),
        held=Checked([average_bytes(count, kept) for count in elements], _of_all(nbytes(averages))),
        moved=Checked([update_bytes(count, kept) for count in elements], _of_all(update.bytes_moved)),
        sent=Checked([swap_network_bytes(shapes, spread, kept, rank) for rank in ranks], _of_all(sent)),
        sent_by_update=sent_by_update,
        grown=grown,
        seconds=seconds[UPDATE],
        seconds_copy=seconds[COPY],
    )


def spread_of(case: Case, *, split: bool) -> Spread:
    if case.parallel == "ddp":
        return Spread(replicas=case.ranks, split=split)
    if case.parallel == "hsdp":
        return Spread(shards=case.ranks // 2, replicas=2, split=split)
    return Spread(shards=case.ranks)


def _seconds(
    model: nn.Module, update: Callable[[], object], size: int, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    copy = Copy(size, device)

    def before(_: str) -> None:
        change_weights(model, factor=1.0)
        copy.warm()

    seconds = in_turn({COPY: copy.run, UPDATE: update}, before=before, repeats=repeats, device=device)
    slowest = {name: highest(samples, device) for name, samples in seconds.items()}
    return slowest | {COPY: [copy.scale * sample for sample in slowest[COPY]]}


def _of_all(value: int) -> list[int]:
    """What each rank has. Collective: every rank."""
    values: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
