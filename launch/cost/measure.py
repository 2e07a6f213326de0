"""Measures the cost of one model's averages on each rank, next to the predictions of `launch.benchmark.formulas`."""

import math
from dataclasses import replace

import torch
import torch.distributed as dist

from launch.benchmark.averaging_methods import sharded_ema
from launch.benchmark.cases import Case, local, nbytes, scale_weights
from launch.benchmark.formulas import Sharding, average_bytes, average_elements, swap_network_bytes, update_bytes
from launch.benchmark.measure import InterleavedCalls, Record, highest, peak_memory
from launch.benchmark.operators import count_operators
from launch.benchmark.updates import DECAYS, CopyBaseline


def measure_costs(device: torch.device, *, case: Case, split: bool, tracks: int, repeats: int) -> list[Record]:
    """`held_bytes`, `moved_bytes` and `swap_sent_bytes` have a predicted and a measured number for each rank.

    `update_sent_bytes` is the payload of collectives in an update, and `process_growth_bytes` the growth of the process
    while the averages were made; both are maxima over ranks. `seconds` are the times of updates on the slowest rank,
    and `seconds_copy` those of a copy of as many bytes.
    """
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
    copy = CopyBaseline(update_bytes(elements[dist.get_rank()], element_sizes), device)

    def before(_: str) -> None:
        scale_weights(model, factor=1.0)
        copy.warm_source()

    seconds = InterleavedCalls({"copy": copy.run, "update": ema.update}, device, before).measure(repeats).seconds
    assert ema.swapped is not None
    swap = ema.swapped()
    swap_sent_bytes = count_operators(swap.__enter__).bytes_sent
    swap.__exit__(None, None, None)
    sent, growth = highest([update.bytes_sent, process_growth_bytes], device)
    predicted = {
        "held_bytes": [average_bytes(count, element_sizes) for count in elements],
        "moved_bytes": [update_bytes(count, element_sizes) for count in elements],
        "swap_sent_bytes": [swap_network_bytes(shapes, sharding, element_sizes, rank) for rank in ranks],
    }
    measured = {"held_bytes": nbytes(averages), "moved_bytes": update.bytes_moved, "swap_sent_bytes": swap_sent_bytes}
    record = {
        "case": case,
        "sharding": sharding,
        "tracks": tracks,
        "elements": sum(map(math.prod, shapes)),
        "update_sent_bytes": int(sent),
        "process_growth_bytes": int(growth),
        "seconds": seconds["update"],
        "seconds_copy": copy.scaled(seconds["copy"]),
    }
    return [record | {key: {"formula": predicted[key], "measured": _all_gather(measured[key])} for key in predicted}]


def sharding_of(case: Case, *, split: bool) -> Sharding:
    if case.parallel == "ddp":
        return Sharding(replicas=case.ranks, split=split)
    if case.parallel == "hsdp":
        return Sharding(shards=case.ranks // 2, replicas=2, split=split)
    return Sharding(shards=case.ranks)


def _all_gather(value: int) -> list[int]:
    """The value of each rank. Collective: every rank."""
    values: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
