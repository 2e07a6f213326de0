"""The tables of docs/cost.md: formulas beside measurements, and what they say of models too large to measure."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.benchmark.formulas import (
    Decoder,
    ElementSizes,
    Sharding,
    TrainingStep,
    average_bytes,
    average_elements,
    live_elements,
    swap_network_bytes,
    update_bytes,
    update_time_ratio,
)
from launch.benchmark.report import Table, mib, ms
from launch.benchmark.results import Results, Target, layout, median_ratio
from launch.cost.measure import CostMeasurement, FormulaCheck

LLAMAS = [
    Decoder("Llama 3.1 8B", layers=32, width=4096, hidden=14336, kv_width=1024, vocabulary=128256),
    Decoder("Llama 3.1 70B", layers=80, width=8192, hidden=28672, kv_width=1024, vocabulary=128256),
    Decoder("Llama 3.1 405B", layers=126, width=16384, hidden=53248, kv_width=1024, vocabulary=128256),
]
"""Source: Llama Team 2024, The Llama 3 Herd of Models, table 3."""
SHARDINGS = [
    Sharding(shards=8),
    Sharding(replicas=8),
    Sharding(replicas=8, split=False),
    Sharding(shards=8, replicas=128),
    Sharding(shards=8, replicas=128, split=False),
    Sharding(shards=128, replicas=8),
    Sharding(shards=64, replicas=256),
    Sharding(shards=1024),
    Sharding(shards=16384),
]
BF16 = ElementSizes(live_itemsize=2)
MEMORY_BANDWIDTH = 3.35e12
"""Of an H100 SXM, bytes per second. Source: NVIDIA's data sheet."""
REACHED_BANDWIDTH = 0.9
PEAK_FLOPS = 989e12
"""Of an H100 SXM in bfloat16 without sparsity, per second. Source: NVIDIA's data sheet."""
FLOPS_UTILIZATION = 0.4
BATCH_TOKENS = 4e6
GPU_BYTES = 80e9
CHECKED_COLUMNS = [
    *(
        "case",
        "averages MiB",
        "",
        "process grew MiB",
        "update moves MiB",
        "",
        "swap sends MiB",
        "",
        "update sends",
    ),
]
PROJECTED_COLUMNS = [
    *("model", "ranks", "layout", "averages MiB", "of 80 GB", "times even", "update moves MiB", "ms", "swap sends MiB"),
]


@dataclass
class CostResults(Results):
    """What one run measured beside the formulas."""

    costs: list[CostMeasurement] = field(default_factory=list)

    def targets(self) -> Iterator[Target]:
        for costs in self.costs:
            checks = {"averages": costs.held_bytes, "update": costs.moved_bytes, "swap": costs.swap_sent_bytes}
            for name, check in checks.items():
                yield Target(f"{_case(costs)}: {name}", 0, 100 * check.relative_error, "%")
            yield Target(f"{_case(costs)}: collectives in an update", 0, costs.update_sent_bytes, "bytes")

    def notes(self) -> list[str]:
        shapes = {str(costs.case.shape): costs.elements for costs in self.costs}
        what = "; ".join(f"{shape}, {elements:,} elements" for shape, elements in shapes.items())
        return [f"Measured on a {what}. The first number is the first rank's.", *super().notes()]

    def as_json(self) -> dict[str, Any]:
        return super().as_json() | {"costs": [asdict(costs) for costs in self.costs]}


def cost_tables(results: CostResults) -> list[Table]:
    return [
        Table(
            "Measured: formula and measurement of every rank",
            CHECKED_COLUMNS,
            1,
            [_checked_row(costs) for costs in results.costs],
        ),
        Table(
            "Measured: time of an update, of the slowest rank",
            ["case", "median ms", "of a copy of as many bytes", "times the copy"],
            1,
            [_time_row(costs) for costs in results.costs],
        ),
        Table(
            "Projected, not measured: the first rank, bfloat16 live weights, float32 averages",
            PROJECTED_COLUMNS,
            1,
            [*_projections(LLAMAS, SHARDINGS)],
        ),
        Table(
            "Projected, not measured: tracks, on 1024 ranks (FSDP2)",
            ["model", "tracks", "averages MiB", "update ms", "share of a step"],
            1,
            [*_track_rows(LLAMAS)],
        ),
    ]


def _checked_row(costs: CostMeasurement) -> Sequence[str]:
    held_bytes, moved_bytes, swap_sent_bytes = (
        _cells(check) for check in (costs.held_bytes, costs.moved_bytes, costs.swap_sent_bytes)
    )
    return (
        _case(costs),
        *held_bytes,
        mib(costs.process_growth_bytes),
        *moved_bytes,
        *swap_sent_bytes,
        str(costs.update_sent_bytes),
    )


def _cells(check: FormulaCheck) -> tuple[str, str]:
    """What the ranks have, and whether each has what the formula says."""
    shown = ", ".join(mib(size) for size in check.measured)
    return shown, "=" if check.formula == check.measured else f"formula: {', '.join(map(mib, check.formula))}"


def _time_row(costs: CostMeasurement) -> Sequence[str]:
    medians = [ms(statistics.median(samples)) for samples in (costs.seconds, costs.seconds_copy)]
    return _case(costs), *medians, f"{median_ratio(costs.seconds, costs.seconds_copy):.2f}"


def _case(costs: CostMeasurement) -> str:
    dtype = "" if costs.case.live == "float32" else f", {costs.case.live}"
    tracks = f", {costs.tracks} tracks" if costs.tracks > 1 else ""
    return layout(costs.case) + ("" if costs.sharding.split else ", copy") + dtype + tracks


def _projections(models: Iterable[Decoder], shardings: Sequence[Sharding]) -> Iterator[Sequence[str]]:
    for model in models:
        shapes, name = model.shapes(), f"{model.name} ({model.elements() / 1e9:.1f}B)"
        for sharding in shardings:
            if live_elements(shapes, sharding) * BF16.live_itemsize > GPU_BYTES:
                continue
            elements = average_elements(shapes, sharding)
            held_bytes, moved_bytes = average_bytes(elements, BF16), update_bytes(elements, BF16)
            even = model.elements() / (sharding.ranks if sharding.split else sharding.shards)
            yield (
                name,
                str(sharding.ranks),
                _layout(sharding),
                mib(held_bytes),
                f"{held_bytes / GPU_BYTES:.1%}",
                f"{elements / even:.2f}",
                mib(moved_bytes),
                f"{1000 * moved_bytes / (REACHED_BANDWIDTH * MEMORY_BANDWIDTH):.3f}",
                mib(swap_network_bytes(shapes, sharding, BF16)),
            )
            name = ""


def _track_rows(models: Iterable[Decoder]) -> Iterator[Sequence[str]]:
    sharding = Sharding(shards=1024)
    bandwidth = REACHED_BANDWIDTH * MEMORY_BANDWIDTH
    step = TrainingStep(BATCH_TOKENS, FLOPS_UTILIZATION * PEAK_FLOPS, bandwidth)
    for model in models:
        elements, name = average_elements(model.shapes(), sharding), model.name
        for tracks in (1, 2, 4):
            element_sizes = ElementSizes(live_itemsize=2, tracks=tracks)
            held_bytes, moved_bytes = average_bytes(elements, element_sizes), update_bytes(elements, element_sizes)
            share = update_time_ratio(sharding, element_sizes, step)
            yield name, str(tracks), mib(held_bytes), f"{1000 * moved_bytes / bandwidth:.3f}", f"{share:.4%}"
            name = ""


def _layout(sharding: Sharding) -> str:
    copies = "" if sharding.split else ', replicas="copy"'
    if sharding.replicas == 1:
        return "FSDP2"
    return f"DDP{copies}" if sharding.shards == 1 else f"HSDP, {sharding.shards} shards{copies}"
