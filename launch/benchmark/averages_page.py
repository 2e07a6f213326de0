"""The page on averages: the cases measured, the targets, and the tables."""

import statistics
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from launch.benchmark.averaging_methods import FOREACH, OURS, OURS_AUTO, PEER_METHODS, SERVING, SHORT_NAMES
from launch.benchmark.cases import Case, LiveDtype, Parallel, SmallTensors, Transformer
from launch.benchmark.measure import Record, median_ratio
from launch.benchmark.page import MIB, Environment, Page, Table, Target, entry, mib, ms, quartiles, target_table
from launch.benchmark.picture import averages_picture, large_update, ratio_text, update_case
from launch.benchmark.run import Run
from launch.benchmark.steps import OVERLAPPED, overlap_costs, step_share_costs
from launch.benchmark.swaps import SWAPPED, full_state_costs, swap_costs
from launch.benchmark.updates import COPY, update_costs

UPDATE_CASES: list[tuple[Parallel, int, LiveDtype]] = [
    ("plain", 1, "float32"),
    ("plain", 1, "bfloat16"),
    ("ddp", 2, "float32"),
    ("fsdp2", 2, "float32"),
    ("fsdp2", 2, "bfloat16"),
]
SWAP_LAYOUTS: list[tuple[Parallel, int]] = [("plain", 1), ("ddp", 2), ("fsdp2", 2)]
TRACKS = (1, 2, 4)
SMALL_TRANSFORMER = Transformer(blocks=4, vocabulary=97)
"""Small enough that every method can keep seven averages of it."""
SIZES = {"30M": SMALL_TRANSFORMER, "100M": Transformer(), "1B": Transformer(blocks=18, width=2048)}
PACKAGES = ("timm", "ema-pytorch", "diffusers", "pytorch-lightning")
Results = dict[str, list[Record]]


def measure_averages(run: Run) -> Page:
    small, large, tracked = SmallTensors(), run.large, SMALL_TRANSFORMER
    if run.quick:
        small, large, tracked = SmallTensors(20, 8), Transformer(2, 16, 97), Transformer(1, 16, 97)
    environment = Environment.here(run.device_type)
    results: Results = {key: [] for key in ("updates", "tracks", "swaps", "exports", "steps", "overlap")}
    for shape in (small, tracked):
        results["tracks"] += run.measure(update_costs, Case("plain", 1, shape), tracks=TRACKS)
    one_track = {it["case"]: it for it in results["tracks"] if it["tracks"] == 1}
    for parallel, ranks, live in UPDATE_CASES:
        for case in (Case(parallel, ranks, shape, live) for shape in (small, large)):
            results["updates"] += [one_track[case]] if case in one_track else run.measure(update_costs, case)
    for parallel, ranks in SWAP_LAYOUTS:
        case = Case(parallel, ranks, large)
        for shape in (small, large):
            results["swaps"] += run.measure(swap_costs, Case(parallel, ranks, shape))
        results["exports"] += run.measure(full_state_costs, case)
        results["steps"] += run.measure(step_share_costs, case)
    if run.device_type == "cuda" and not run.quick:
        overlap_case = Case("fsdp2", torch.cuda.device_count(), SIZES["1B"])
    else:
        overlap_case = Case("fsdp2", 2, tracked)
    results["overlap"] += run.measure(overlap_costs, overlap_case)
    packages = {name: _version(name) for name in PACKAGES}
    return averages_page(environment, run.not_measured, results, packages=packages)


def averages_page(
    environment: Environment, not_measured: list[str], results: Results, *, packages: dict[str, str]
) -> Page:
    targets = [*_targets(results, on_gpu=environment.gpu is not None)]
    return Page(
        environment,
        not_measured,
        {"packages": packages, **results},
        notes=[f"Peers: {', '.join(f'{name} {found}' for name, found in packages.items())}."],
        targets=targets,
        tables=[*_tables(results), target_table(targets)],
        picture=averages_picture(results["updates"], results["swaps"], environment),
        summary=[*_summary(results)],
    )


def _summary(results: Results) -> Iterator[str]:
    """The time and memory of an update, compared with the other methods."""
    for parallel in ("ddp", "fsdp2"):
        update = large_update(results["updates"], parallel)
        if update is None or OURS not in update["seconds"]:
            continue
        peers = [name for name in update["seconds"] if name in PEER_METHODS]
        times = ", ".join(f"{SHORT_NAMES[name]} {_median_ms(update['seconds'][name])}" for name in peers)
        kept = sorted({mib(update["held_bytes"][name]) for name in peers})
        case = _with_elements(update, str(update["case"]))
        yield (
            f"**{case}:** an update takes {_median_ms(update['seconds'][OURS])} ms ({times or 'no other runs'}), and a "
            f"rank keeps {mib(update['held_bytes'][OURS])} MiB of averages"
            + (f" (the others: {' or '.join(kept)})." if kept else ".")
        )
        if failing := [SHORT_NAMES[name] for name in update["failures"]]:
            yield f"**{update['case'].layout}:** {', '.join(failing)} fail, see *What fails, and how*."
    for steps in results["steps"]:
        if steps["parallel"] == "fsdp2":
            share = f"{steps['shares'][OURS]:.1%}"
            yield f"**A step of launch/train.py, {_layout(steps)}:** `update()` takes {share} of it. The model is tiny."


def _targets(results: Results, *, on_gpu: bool) -> Iterator[Target]:
    yield from _gpu_targets(results) if on_gpu else _cpu_targets(results)
    for swap in results["swaps"]:
        if isinstance(swap["case"].shape, Transformer):
            what = f"{swap['case']}: swapped(), beyond live weights and averages"
            yield Target(what, 64, swap["extra_bytes"][SWAPPED] / MIB, "MiB")
    for export in results["exports"]:
        what, one_tensor = f"{export['case']}: full_state_dict()", export["largest_tensor_bytes"] / MIB
        yield Target(f"{what}, beyond the result on rank 0", one_tensor, export["extra_bytes"] / MIB, "MiB")
        if export["case"].ranks > 1:
            yield Target(f"{what}, on other ranks", one_tensor, export["others_bytes"] / MIB, "MiB")
    if not on_gpu:
        yield Target("GPU: update() over a copy of as many bytes, either dtype", 1 / 0.9, None, "x")
        yield Target("GPU: host time of update() of 1000 tensors", 300, None, "us")
    slowdown = results["overlap"][0]["longer"][OVERLAPPED] if on_gpu and results["overlap"] else None
    yield Target("GPU: steps with overlap=True over steps without averages", 1.01, slowdown, "x")


def _gpu_targets(results: Results) -> Iterator[Target]:
    for update in results["updates"]:
        if isinstance(update["case"].shape, Transformer):
            yield Target(f"{update_case(update)}: update() over a {COPY}", 1 / 0.9, _over(update, COPY), "x")
        else:
            host_us = 1e6 * update["host_seconds"][OURS]
            yield Target(f"{update_case(update)}: host time of update()", 300, host_us, "us")


def _cpu_targets(results: Results) -> Iterator[Target]:
    for update in results["updates"]:
        what, over_foreach = f"{update_case(update)}: update() over", _over(update, FOREACH)
        if update["case"].live == "float32":
            yield Target(f"{what} {FOREACH}", 1.1, over_foreach, "x")
        else:
            yield Target(f"{what} a cast and foreach", 0.6, over_foreach, "x")
        is_small, is_narrow = isinstance(update["case"].shape, SmallTensors), update["case"].live != "float32"
        if update["case"].parallel != "ddp" and (is_small or is_narrow):
            over_copy = _over(update, COPY, OURS_AUTO) if OURS_AUTO in update["seconds"] else None
            yield Target(
                f'{update_case(update)}: kernel="auto" over a {COPY}', 1.4 if is_small else 0.9, over_copy, "x"
            )
        peers = {name: statistics.median(own) for name, own in update["seconds"].items() if name in PEER_METHODS}
        if update["case"].parallel == "ddp" and peers:
            best = min(peers, key=lambda name: peers[name])
            yield Target(f"{what} {best}, the best peer", 0.6, _over(update, best), "x")
    for four in results["tracks"]:
        if four["tracks"] == 4:
            one = next(it for it in results["tracks"] if it["case"] == four["case"] and it["tracks"] == 1)
            both = OURS in four["seconds"] and OURS in one["seconds"]
            ratio = median_ratio(four["seconds"][OURS], one["seconds"][OURS]) if both else None
            yield Target(f"{update_case(four)}: update() over that of one", 2.6, ratio, "x")
    for swap in results["swaps"]:
        what, has = f"{swap['case']}: serving()", SERVING in swap["seconds_in"]
        if swap["case"].parallel == "ddp":  # under DDP, it must gather
            continue
        if isinstance(swap["case"].shape, SmallTensors):
            seconds = zip(swap["seconds_in"].get(SERVING, ()), swap["seconds_out"].get(SERVING, ()), strict=True)
            in_and_out = 1000 * statistics.median(map(sum, seconds)) if has else None
            yield Target(f"{what}, in and out", 2, in_and_out, "ms")
        else:
            yield Target(f"{what}, memory", 0, swap["extra_bytes"][SERVING] / MIB if has else None, "MiB")


def _tables(results: Results) -> list[Table]:
    updates = results["updates"]
    other_tracks = [it for it in results["tracks"] if it not in updates]
    return [
        Table(
            "Time of an update, relative to a copy of as many bytes",
            ["case", *SHORT_NAMES.values()],
            [
                [update_case(it), *(ratio_text(it, name) for name in SHORT_NAMES)]
                for it in (*updates, *(it for it in results["tracks"] if it["tracks"] > 1))
            ],
        ),
        Table.by_method(
            "Updates: slowest rank of each round",
            [*updates, *other_tracks],
            {
                "case": lambda it, _: _with_elements(it, update_case(it)),
                "averaged by": lambda _, name: name,
                "median ms": entry("seconds", _median_ms),
                "quartiles ms": entry("seconds", lambda seconds: quartiles(seconds, ms)),
                "times the copy": entry("times_reference", "{:.2f}".format),
                "times foreach": lambda it, name: "" if name == COPY else f"{_over(it, FOREACH, name):.2f}",
                "moved MiB": entry("moved_bytes", mib),
                "operators": entry("operators", str),
                "averages MiB": entry("held_bytes", mib),
                "extra MiB": entry("extra_bytes", mib),
            },
        ),
        Table.by_method(
            "Computing with the averages: memory of one rank",
            results["swaps"],
            {
                "case": lambda it, _: str(it["case"]),
                "by": lambda _, name: name,
                "averages MiB": entry("held_bytes", mib),
                "extra MiB": entry("extra_bytes", mib),
                "median ms in": entry("seconds_in", _median_ms),
                "median ms out": entry("seconds_out", _median_ms),
            },
            key="held_bytes",
        ),
        Table.by_record(
            "full_state_dict()",
            results["exports"],
            {
                "case": lambda it: str(it["case"]),
                "result MiB": lambda it: mib(it["result_bytes"]),
                "largest tensor MiB": lambda it: mib(it["largest_tensor_bytes"]),
                "beyond the result MiB": lambda it: mib(it["extra_bytes"]),
                "other ranks MiB": lambda it: mib(it["others_bytes"]) if it["case"].ranks > 1 else "",
                "median ms": lambda it: _median_ms(it["seconds"]),
            },
        ),
        Table.by_method(
            "Share of a step of launch/train.py",
            results["steps"],
            {
                "case": lambda it, _: _layout(it),
                "averaged by": lambda _, name: name,
                "step ms": lambda it, _: _median_ms(it["seconds_step"]),
                "update ms": entry("seconds", _median_ms),
                "share": entry("shares", "{:.1%}".format),
            },
            once=("case", "step ms"),
        ),
        Table.by_method(
            "Time of a training step with averages, on the slowest rank",
            results["overlap"],
            {
                "case": lambda it, _: _with_elements(it, str(it["case"])),
                "averages": lambda _, name: name,
                "step ms": entry("seconds", _median_ms),
                "times without": entry("longer", "{:.3f}".format),
            },
        ),
        Table("What fails, and how", ["by", "how", "where"], [*_failures(results)], words=3),
    ]


def _failures(results: Results) -> Iterator[tuple[str, str, str]]:
    found = [(update_case(it), it["failures"]) for it in (*results["updates"], *results["tracks"])]
    found += [(f"{it['case']}, swapping", it["failures"]) for it in results["swaps"]]
    found += [(f"{_layout(it)}, launch/train.py", it["failures"]) for it in results["steps"]]
    where: dict[tuple[str, str], list[str]] = {}
    for case, failures in found:
        for name, how in failures.items():
            where.setdefault((name, how), []).append(case)
    for (name, how), cases in where.items():
        yield name, how, "everywhere" if len(cases) == len(found) else "; ".join(cases)


def _over(update: Record, other: str, name: str = OURS) -> float:
    """The median ratio of a method's time to that of another."""
    return median_ratio(update["seconds"][name], update["seconds"][other])


def _median_ms(seconds: Iterable[float]) -> str:
    return ms(statistics.median(seconds))


def _with_elements(record: Record, case: str) -> str:
    return f"{case} ({record['elements'] / 1e6:.1f}M)"


def _layout(record: Record) -> str:
    return Case(record["parallel"], record["ranks"], SmallTensors()).layout


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
