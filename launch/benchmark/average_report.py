"""What a run of the benchmark has found about averages, and which targets it reached."""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from launch.benchmark.averaging_methods import FOREACH, OURS, PEER_METHODS, SERVING
from launch.benchmark.cases import SmallTensors, Transformer
from launch.benchmark.overlapped_steps import OVERLAPPED, StepCosts
from launch.benchmark.results import MIB, Results, Target, describe, median_ratio, times_reference
from launch.benchmark.steps import StepShares
from launch.benchmark.swaps import SWAPPED, ExportCosts, SwapCosts
from launch.benchmark.updates import COPY, UpdateCosts

LIMIT_TIMES_FOREACH = 1.1
LIMIT_TIMES_CAST_AND_FOREACH = 0.6
LIMIT_TIMES_BEST_PEER = 0.6
LIMIT_FOUR_TRACKS = 2.6
LIMIT_SWAP_MIB = 64.0
LIMIT_SERVING_MS = 2.0
LIMIT_TIMES_COPY = 1 / 0.9
LIMIT_HOST_US = 300.0
LIMIT_LONGER_STEPS = 1.01
PICTURE = "results.png"
PACKAGES = ("timm", "ema-pytorch", "diffusers", "pytorch-lightning")


@dataclass
class AverageResults(Results):
    """What one run measured of updates, swaps, full state dicts and steps."""

    packages: dict[str, str] = field(default_factory=dict)
    updates: list[UpdateCosts] = field(default_factory=list)
    tracks: list[UpdateCosts] = field(default_factory=list)
    """Those of one case were measured in the same rounds."""
    swaps: list[SwapCosts] = field(default_factory=list)
    exports: list[ExportCosts] = field(default_factory=list)
    steps: list[StepShares] = field(default_factory=list)
    overlap: list[StepCosts] = field(default_factory=list)

    def targets(self) -> Iterator[Target]:
        yield from self._on_gpu() if self.environment.gpu else self._on_cpu()
        for swap in self.swaps:
            if isinstance(swap.case.shape, Transformer):
                what = f"{describe(swap.case)}: swapped(), beyond live weights and averages"
                yield Target(what, LIMIT_SWAP_MIB, swap.extra_bytes[SWAPPED] / MIB, "MiB")
        for export in self.exports:
            one_tensor = export.largest_tensor_bytes / MIB
            what = f"{describe(export.case)}: full_state_dict()"
            yield Target(f"{what}, beyond the result on rank 0", one_tensor, export.extra_bytes / MIB, "MiB")
            if export.case.ranks > 1:
                yield Target(f"{what}, on other ranks", one_tensor, export.others_bytes / MIB, "MiB")
        if not self.environment.gpu:
            yield Target("GPU: update() over a copy of as many bytes, either dtype", LIMIT_TIMES_COPY, None, "x")
            yield Target("GPU: host time of update() of 1000 tensors", LIMIT_HOST_US, None, "us")
        slowdown = self.overlap[0].slowdown(OVERLAPPED) if self.environment.gpu and self.overlap else None
        yield Target("GPU: steps with overlap=True over steps without averages", LIMIT_LONGER_STEPS, slowdown, "x")

    def notes(self) -> list[str]:
        versions = ", ".join(f"{name} {found}" for name, found in self.packages.items())
        picture = f"![Time of an update by each way, in each case]({PICTURE})"
        return [f"Peers: {versions}.", *super().notes(), picture]

    def as_json(self) -> dict[str, Any]:
        found = {
            "updates": [_update_json(costs) for costs in self.updates],
            "tracks": [_update_json(costs) for costs in self.tracks],
            "steps": [asdict(it) | {"shares": it.shares()} for it in self.steps],
            "overlap": [
                asdict(it) | {"longer": {name: it.slowdown(name) for name in it.seconds}} for it in self.overlap
            ],
        }
        return super().as_json() | found

    def _on_cpu(self) -> Iterator[Target]:
        for costs in self.updates:
            what = update_case(costs)
            if costs.case.live == "float32":
                yield Target(f"{what}: update() over {FOREACH}", LIMIT_TIMES_FOREACH, over(costs, FOREACH), "x")
            else:
                over_foreach = over(costs, FOREACH)
                yield Target(
                    f"{what}: update() over a cast and foreach", LIMIT_TIMES_CAST_AND_FOREACH, over_foreach, "x"
                )
            if costs.case.parallel == "ddp" and (best := best_peer(costs)):
                yield Target(
                    f"{what}: update() over {best}, the best peer", LIMIT_TIMES_BEST_PEER, over(costs, best), "x"
                )
        for several, one in _four_and_one(self.tracks):
            both = OURS in several.seconds and OURS in one.seconds
            ratio = median_ratio(several.seconds[OURS], one.seconds[OURS]) if both else None
            yield Target(f"{update_case(several)}: update() over that of one", LIMIT_FOUR_TRACKS, ratio, "x")
        yield from self._of_serving()

    def _of_serving(self) -> Iterator[Target]:
        for swap in self.swaps:
            if swap.case.parallel == "ddp":  # there it must gather
                continue
            what = f"{describe(swap.case)}: serving()"
            has = SERVING in swap.seconds_in
            if isinstance(swap.case.shape, SmallTensors):
                both = zip(swap.seconds_in.get(SERVING, ()), swap.seconds_out.get(SERVING, ()), strict=True)
                ms = 1000 * statistics.median(map(sum, both)) if has else None
                yield Target(f"{what}, in and out", LIMIT_SERVING_MS, ms, "ms")
            else:
                yield Target(f"{what}, memory", 0, swap.extra_bytes[SERVING] / MIB if has else None, "MiB")

    def _on_gpu(self) -> Iterator[Target]:
        for costs in self.updates:
            if isinstance(costs.case.shape, Transformer):
                yield Target(f"{update_case(costs)}: update() over a {COPY}", LIMIT_TIMES_COPY, over(costs, COPY), "x")
            else:
                host_us = 1e6 * costs.host_seconds[OURS]
                yield Target(f"{update_case(costs)}: host time of update()", LIMIT_HOST_US, host_us, "us")


def over(costs: UpdateCosts, other: str) -> float:
    """How many times as long as another way ours takes."""
    return median_ratio(costs.seconds[OURS], costs.seconds[other])


def best_peer(costs: UpdateCosts) -> str | None:
    """The fastest of those that keep a copy; None where none works."""
    medians = {name: statistics.median(costs.seconds[name]) for name in PEER_METHODS if name in costs.seconds}
    return min(medians, key=lambda name: medians[name], default=None)


def found_packages() -> dict[str, str]:
    """The version of each peer, or that it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def update_case(costs: UpdateCosts) -> str:
    return describe(costs.case) + (f", {costs.tracks} tracks" if costs.tracks > 1 else "")


def _four_and_one(tracks: Iterable[UpdateCosts]) -> Iterator[tuple[UpdateCosts, UpdateCosts]]:
    ones = {costs.case: costs for costs in tracks if costs.tracks == 1}
    return ((costs, ones[costs.case]) for costs in tracks if costs.tracks == 4)


def _update_json(costs: UpdateCosts) -> dict[str, Any]:
    return asdict(costs) | {"times_reference": times_reference(costs.seconds)}
