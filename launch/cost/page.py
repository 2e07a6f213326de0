"""The tables of docs/cost.md: formulas beside measurements, and what they predict for models too large to measure."""

import statistics
from collections.abc import Iterator, Sequence

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
from launch.benchmark.measure import Record, median_ratio
from launch.benchmark.page import Environment, Page, Table, Target, mib, ms

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
MEMORY_BANDWIDTH = 0.9 * 3.35e12
"""Bytes per second: 90 % of the bandwidth of an H100 SXM. Source: NVIDIA's data sheet."""
FLOPS_PER_SECOND = 0.4 * 989e12
"""40 % of the peak of an H100 SXM in bfloat16 without sparsity. Source: NVIDIA's data sheet."""
STEP = TrainingStep(tokens=4e6, flops_per_second=FLOPS_PER_SECOND, memory_bandwidth=MEMORY_BANDWIDTH)
GPU_BYTES = 80e9
CHECKED_COLUMNS = [
    *("case", "averages MiB", "", "process grew MiB", "update moves MiB", "", "swap sends MiB", "", "update sends")
]
PROJECTED_COLUMNS = [
    *("model", "ranks", "layout", "averages MiB", "of 80 GB", "times even", "update moves MiB", "ms", "swap sends MiB")
]
CHECKS = {"averages": "held_bytes", "update": "moved_bytes", "swap": "swap_sent_bytes"}


def cost_page(environment: Environment, not_measured: list[str], costs: list[Record]) -> Page:
    shapes = {str(it["case"].shape): it["elements"] for it in costs}
    what = "; ".join(f"{shape}, {elements:,} elements" for shape, elements in shapes.items())
    return Page(
        environment,
        not_measured,
        {"costs": costs},
        notes=[f"Measured on a {what}. The first number is the first rank's."],
        targets=[*_targets(costs)],
        tables=[
            Table("Measured: formula and measurement of every rank", CHECKED_COLUMNS, [*map(_checked_row, costs)]),
            Table.by_record(
                "Measured: time of an update, of the slowest rank",
                costs,
                {
                    "case": _case,
                    "median ms": lambda it: ms(statistics.median(it["seconds"])),
                    "of a copy of as many bytes": lambda it: ms(statistics.median(it["seconds_copy"])),
                    "times the copy": lambda it: f"{median_ratio(it['seconds'], it['seconds_copy']):.2f}",
                },
            ),
            Table(
                "Projected, not measured: the first rank, bfloat16 live weights, float32 averages",
                PROJECTED_COLUMNS,
                [row for model in LLAMAS for row in _projections(model)],
            ),
            Table(
                "Projected, not measured: tracks, on 1024 ranks (FSDP2)",
                ["model", "tracks", "averages MiB", "update ms", "share of a step"],
                [row for model in LLAMAS for row in _track_rows(model, Sharding(shards=1024))],
            ),
        ],
    )


def _targets(costs: list[Record]) -> Iterator[Target]:
    for it in costs:
        for name, key in CHECKS.items():
            formula, measured = it[key]["formula"], it[key]["measured"]
            error = max(abs(own - predicted) for own, predicted in zip(measured, formula, strict=True))
            yield Target(f"{_case(it)}: {name}", 0, 100 * error / max(1, formula[0]), "%")
        yield Target(f"{_case(it)}: collectives in an update", 0, it["update_sent_bytes"], "bytes")


def _checked_row(it: Record) -> Sequence[str]:
    """The measured values of all ranks, and whether they equal those of the formula."""
    held, moved, sent = (
        (
            _sizes(it[key]["measured"]),
            "=" if it[key]["formula"] == it[key]["measured"] else f"formula: {_sizes(it[key]['formula'])}",
        )
        for key in CHECKS.values()
    )
    return _case(it), *held, mib(it["process_growth_bytes"]), *moved, *sent, str(it["update_sent_bytes"])


def _sizes(sizes: Sequence[int]) -> str:
    return ", ".join(map(mib, sizes))


def _case(it: Record) -> str:
    dtype = "" if it["case"].live == "float32" else f", {it['case'].live}"
    tracks = f", {it['tracks']} tracks" if it["tracks"] > 1 else ""
    return it["case"].layout + ("" if it["sharding"].split else ", copy") + dtype + tracks


def _projections(model: Decoder) -> Iterator[Sequence[str]]:
    shapes, name = model.shapes(), f"{model.name} ({model.elements() / 1e9:.1f}B)"
    for sharding in SHARDINGS:
        if live_elements(shapes, sharding) * BF16.live_itemsize > GPU_BYTES:
            continue
        elements = average_elements(shapes, sharding)
        held_bytes, moved_bytes = average_bytes(elements, BF16), update_bytes(elements, BF16)
        even = model.elements() / (sharding.ranks if sharding.split else sharding.shards)
        size = mib(held_bytes), f"{held_bytes / GPU_BYTES:.1%}", f"{elements / even:.2f}"
        update = mib(moved_bytes), f"{1000 * moved_bytes / MEMORY_BANDWIDTH:.3f}"
        yield (
            name,
            str(sharding.ranks),
            _layout(sharding),
            *size,
            *update,
            mib(swap_network_bytes(shapes, sharding, BF16)),
        )
        name = ""


def _track_rows(model: Decoder, sharding: Sharding) -> Iterator[Sequence[str]]:
    elements, name = average_elements(model.shapes(), sharding), model.name
    for tracks in (1, 2, 4):
        sizes = ElementSizes(live_itemsize=2, tracks=tracks)
        milliseconds = f"{1000 * update_bytes(elements, sizes) / MEMORY_BANDWIDTH:.3f}"
        share = f"{update_time_ratio(sharding, sizes, STEP):.4%}"
        yield name, str(tracks), mib(average_bytes(elements, sizes)), milliseconds, share
        name = ""


def _layout(sharding: Sharding) -> str:
    copies = "" if sharding.split else ', replicas="copy"'
    if sharding.replicas == 1:
        return "FSDP2"
    return f"DDP{copies}" if sharding.shards == 1 else f"HSDP, {sharding.shards} shards{copies}"
