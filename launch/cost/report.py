"""The tables of docs/cost.md: formulas beside measurements, and what they say of models too large to measure."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.benchmark.formulas import (
    Decoder,
    Kept,
    Spread,
    Step,
    average_bytes,
    average_elements,
    live_elements,
    share_of_step,
    swap_network_bytes,
    update_bytes,
)
from launch.benchmark.report import Table, mib, ms
from launch.benchmark.results import Results, Target, layout, median_ratio
from launch.cost.measure import Checked, CostCheck

LLAMAS = [
    Decoder("Llama 3.1 8B", layers=32, width=4096, hidden=14336, key_width=1024, vocabulary=128256),
    Decoder("Llama 3.1 70B", layers=80, width=8192, hidden=28672, key_width=1024, vocabulary=128256),
    Decoder("Llama 3.1 405B", layers=126, width=16384, hidden=53248, key_width=1024, vocabulary=128256),
]
"""Source: Llama Team 2024, The Llama 3 Herd of Models, table 3."""
SPREADS = [
    Spread(shards=8),
    Spread(replicas=8),
    Spread(replicas=8, split=False),
    Spread(shards=8, replicas=128),
    Spread(shards=8, replicas=128, split=False),
    Spread(shards=128, replicas=8),
    Spread(shards=64, replicas=256),
    Spread(shards=1024),
    Spread(shards=16384),
]
BF16 = Kept(live_width=2)
MEMORY_BANDWIDTH = 3.35e12
"""Of an H100 SXM, bytes per second. Source: NVIDIA's data sheet."""
REACHED_BANDWIDTH = 0.9
PEAK_OPERATIONS = 989e12
"""Of an H100 SXM in bfloat16 without sparsity, per second. Source: NVIDIA's data sheet."""
REACHED_OPERATIONS = 0.4
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

    costs: list[CostCheck] = field(default_factory=list)

    def targets(self) -> Iterator[Target]:
        for costs in self.costs:
            checks = {"averages": costs.held, "update": costs.moved, "swap": costs.sent}
            for name, check in checks.items():
                yield Target(f"{_case(costs)}: {name}", 0, 100 * check.differ_by, "%")
            yield Target(f"{_case(costs)}: collectives in an update", 0, costs.sent_by_update, "bytes")

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
            [*_projections(LLAMAS, SPREADS)],
        ),
        Table(
            "Projected, not measured: tracks, on 1024 ranks (FSDP2)",
            ["model", "tracks", "averages MiB", "update ms", "share of a step"],
            1,
            [*_track_rows(LLAMAS)],
        ),
    ]


def _checked_row(costs: CostCheck) -> Sequence[str]:
    held, moved, sent = (_cells(check) for check in (costs.held, costs.moved, costs.sent))
    return _case(costs), *held, mib(costs.grown), *moved, *sent, str(costs.sent_by_update)


def _cells(check: Checked) -> tuple[str, str]:
    """What the ranks have, and whether each has what the formula says."""
    shown = ", ".join(mib(size) for size in check.measured)
    return shown, "=" if check.formula == check.measured else f"formula: {', '.join(map(mib, check.formula))}"


def _time_row(costs: CostCheck) -> Sequence[str]:
    medians = [ms(statistics.median(samples)) for samples in (costs.seconds, costs.seconds_copy)]
    return _case(costs), *medians, f"{median_ratio(costs.seconds, costs.seconds_copy):.2f}"


def _case(costs: CostCheck) -> str:
    dtype = "" if costs.case.live == "float32" else f", {costs.case.live}"
    tracks = f", {costs.tracks} tracks" if costs.tracks > 1 else ""
    return layout(costs.case) + ("" if costs.spread.split else ", copy") + dtype + tracks


def _projections(models: Iterable[Decoder], spreads: Sequence[Spread]) -> Iterator[Sequence[str]]:
    for model in models:
        shapes, name = model.shapes(), f"{model.name} ({model.elements() / 1e9:.1f}B)"
        for spread in spreads:
            if live_elements(shapes, spread) * BF16.live_width > GPU_BYTES:
                continue
            elements = average_elements(shapes, spread)
            held, moved = average_bytes(elements, BF16), update_bytes(elements, BF16)
            even = model.elements() / (spread.ranks if spread.split else spread.shards)
            yield (
                name,
                str(spread.ranks),
                _layout(spread),
                mib(held),
                f"{held / GPU_BYTES:.1%}",
                f"{elements / even:.2f}",
                mib(moved),
                f"{1000 * moved / (REACHED_BANDWIDTH * MEMORY_BANDWIDTH):.3f}",
                mib(swap_network_bytes(shapes, spread, BF16)),
            )
            name = ""


def _track_rows(models: Iterable[Decoder]) -> Iterator[Sequence[str]]:
    spread = Spread(shards=1024)
    bandwidth = REACHED_BANDWIDTH * MEMORY_BANDWIDTH
    step = Step(BATCH_TOKENS, REACHED_OPERATIONS * PEAK_OPERATIONS, bandwidth)
    for model in models:
        elements, name = average_elements(model.shapes(), spread), model.name
        for tracks in (1, 2, 4):
            kept = Kept(live_width=2, tracks=tracks)
            held, moved = average_bytes(elements, kept), update_bytes(elements, kept)
            share = share_of_step(spread, kept, step)
            yield name, str(tracks), mib(held), f"{1000 * moved / bandwidth:.3f}", f"{share:.4%}"
            name = ""


def _layout(spread: Spread) -> str:
    copies = "" if spread.split else ', replicas="copy"'
    if spread.replicas == 1:
        return "FSDP2"
    return f"DDP{copies}" if spread.shards == 1 else f"HSDP, {spread.shards} shards{copies}"
