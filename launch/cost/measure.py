"""What the averages of one model take on each rank, measured, beside what the formulas of `cost.py` say."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from launch.benchmark.averaging_methods import sharded_ema
from launch.benchmark.cases import Case, local, nbytes, scale_weights
from launch.benchmark.formulas import Sharding, average_bytes, average_elements, swap_network_bytes, update_bytes
from launch.benchmark.measure import highest, in_turn, peak_memory
from launch.benchmark.operators import count_operators
from launch.benchmark.updates import DECAYS, CopyBaseline

COPY, UPDATE = "copy", "update"


@dataclass(frozen=True)
class FormulaCheck:
    """A number by formula and measured, one for each rank."""

    formula: list[int]
    measured: list[int]

    @property
    def relative_error(self) -> float:
        """The largest difference on a rank, as a part of what the formula says of the first."""
        differences = (
            abs(measured - predicted) for predicted, measured in zip(self.formula, self.measured, strict=True)
        )
        return max(differences) / max(1, self.formula[0])


@dataclass(frozen=True)
class CostMeasurement:
    """One model in one layout.

    Args:
        elements: of the whole model.
        held_bytes: of the averages.
        moved_bytes: of live weights and averages that an update reads and writes.
        swap_sent_bytes: that pass a rank's network when a swap begins.
        update_sent_bytes: that pass it in an update, the most of all ranks.
        process_growth_bytes: bytes by which the process grew when the averages were made, the most of all ranks.
        seconds: of updates, one a round, of the slowest rank; `seconds_copy` those of a copy of as many bytes.
    """

    case: Case
    sharding: Sharding
    tracks: int
    elements: int
    held_bytes: FormulaCheck
    moved_bytes: FormulaCheck
    swap_sent_bytes: FormulaCheck
    update_sent_bytes: int
    process_growth_bytes: int
    seconds: list[float]
    seconds_copy: list[float]


def measure_costs(device: torch.device, *, case: Case, split: bool, tracks: int, repeats: int) -> CostMeasurement:
    model = case.build_model(device)
    sharding, element_sizes = sharding_of(case, split=split), replace(case.element_sizes, tracks=tracks)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    memory = peak_memory(device)
    memory.reset()
    ema = sharded_ema(model, DECAYS[:tracks], "shard" if split else "copy")
    process_growth_bytes = memory.read()
    averages = [local(average) for track in ema.averages() for average in track.values()]
    live_weights = [local(parameter.detach()) for parameter in model.parameters()]
    update = count_operators(ema.update, tensors=[*live_weights, *averages])
    ranks = range(case.ranks)
    elements = [average_elements(shapes, sharding, rank) for rank in ranks]
    seconds = _time_update(model, ema.update, update_bytes(elements[dist.get_rank()], element_sizes), repeats, device)
    assert ema.swapped is not None
    swap = ema.swapped()
    swap_sent_bytes = count_operators(swap.__enter__).bytes_sent
    swap.__exit__(None, None, None)
    update_sent_bytes, process_growth_bytes = (
        int(maximum) for maximum in highest([update.bytes_sent, process_growth_bytes], device)
    )
    return CostMeasurement(
        case,
        sharding,
        tracks,
        sum(map(math.prod, shapes)),
        held_bytes=FormulaCheck(
            [average_bytes(count, element_sizes) for count in elements], _all_gather(nbytes(averages))
        ),
        moved_bytes=FormulaCheck(
            [update_bytes(count, element_sizes) for count in elements], _all_gather(update.bytes_moved)
        ),
        swap_sent_bytes=FormulaCheck(
            [swap_network_bytes(shapes, sharding, element_sizes, rank) for rank in ranks], _all_gather(swap_sent_bytes)
        ),
        update_sent_bytes=update_sent_bytes,
        process_growth_bytes=process_growth_bytes,
        seconds=seconds[UPDATE],
        seconds_copy=seconds[COPY],
    )


def sharding_of(case: Case, *, split: bool) -> Sharding:
    if case.parallel == "ddp":
        return Sharding(replicas=case.ranks, split=split)
    if case.parallel == "hsdp":
        return Sharding(shards=case.ranks // 2, replicas=2, split=split)
    return Sharding(shards=case.ranks)


def _time_update(
    model: nn.Module, update: Callable[[], object], size: int, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    copy = CopyBaseline(size, device)

    def before(_: str) -> None:
        scale_weights(model, factor=1.0)
        copy.warm_source()

    seconds = in_turn({COPY: copy.run, UPDATE: update}, before=before, repeats=repeats, device=device)
    slowest = {name: highest(samples, device) for name, samples in seconds.items()}
    return slowest | {COPY: [copy.scale * sample for sample in slowest[COPY]]}


def _all_gather(value: int) -> list[int]:
    """What each rank has. Collective: every rank."""
    values: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
