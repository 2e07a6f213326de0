"""Measures the host time of every call on one of 16, 1024 and 8192 ranks, without communication.

    python -m launch.cost.scale --output-dir docs     # takes minutes; writes the results in docs/scale.md
    python -m launch.cost.scale --quick               # a quick check, on tiny models

It runs one process. torch's fake process group stands in for the other ranks.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from launch.benchmark.measure import Record
from launch.benchmark.page import Environment, Page, Table, Target, ms, target_table
from launch.benchmark.run import argument_parser, make_console, parse
from launch.cost.fake_ranks import LAYOUTS, FakeCase, measure_in_subprocess

RANKS = (16, 1024, 8192)
TARGET_LAYOUTS = ("ddp", "fsdp2", "hsdp", "tp")
TENSORS = 300
MAX_GROWTH = 1.5
"""Limit of the time on the most ranks, relative to that on the fewest."""
NEGLIGIBLE_SECONDS = 0.002
"""Shorter times are not compared: noise dominates their ratio."""
LARGE_MODEL = (1024, 720)
"""Ranks and tensors of the model to whose times `LIMITS` applies."""
LIMITS = {
    "swapped(), in and out": (("swapped(), in", "swapped(), out"), 0.15),
    "state_dict()": (("state_dict()",), 0.05),
    "ShardedEMA(model)": (("ShardedEMA(model)",), 0.1),
}


def main() -> None:
    parser = argument_parser("launch.cost.scale", __doc__, output_dir="runs/scale")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each case, at least 2")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    args = parse(parser)
    console = make_console()
    environment = Environment.here("cpu")
    all_ranks, tensors, large = ((16, 64), 3, (64, 5)) if args.quick else (RANKS, TENSORS, LARGE_MODEL)
    cases = [FakeCase(layout, ranks, tensors, args.repeats) for layout in args.layouts for ranks in all_ranks]
    large_cases = [FakeCase(layout, *large, args.repeats) for layout in args.layouts]
    records: list[Record] = []
    for case in [*cases, *large_cases]:
        with console.status(str(case)):
            records.append(measure_in_subprocess(case))
    page = scale_page(environment, records[: len(cases)], records[len(cases) :])
    for table in page.tables:
        console.print(table.for_terminal())
    page.write(args.output_dir, data="scale.json", page="scale.md", program="launch.cost.scale")
    console.print(f"in {args.output_dir}: scale.json, scale.md")
    if not args.quick and any(not target.reached for target in page.targets):
        sys.exit("some calls take longer than they should: see the table of targets")


def scale_page(environment: Environment, records: Sequence[Record], large: Sequence[Record]) -> Page:
    targets = [*_growth_targets(records), *_large_targets(large)]
    shape = _case(records[0]).shape
    return Page(
        environment,
        [],
        {"scale": [*records], "large": [*large]},
        notes=[
            "All times are medians, in milliseconds of CPU time on the first rank.",
            f"The model: {shape} matrices.",
        ],
        targets=targets,
        tables=[
            Table(
                "Measured: host time of each call, by ranks",
                [
                    "layout",
                    "call",
                    *(str(ranks) for ranks in sorted({_case(it).ranks for it in records})),
                    "last / first",
                ],
                [row for _, group in groupby(records, _layout) for row in _rows([*group])],
                words=2,
            ),
            Table(
                f"Measured: host time with {_case(large[0]).shape} matrices, on {_case(large[0]).ranks} ranks",
                ["call", *map(_layout, large)],
                [[call, *(ms(record["seconds"][call]) for record in large)] for call in large[0]["seconds"]],
            ),
            target_table(targets),
        ],
        summary=[*_summary(records)],
    )


def _summary(records: Sequence[Record]) -> Iterator[str]:
    """How much slower the calls are on the most ranks than on the fewest, and the time of an update."""
    growths: list[tuple[float, str, str]] = []
    grown: list[str] = []
    updates: list[str] = []
    for layout, group in groupby(records, _layout):
        first, *_, last = (record["seconds"] for record in group)
        updates.append(f"{ms(last['update()'])} ms ({layout})")
        for call in _compared(last):
            growth = last[call] / first[call]
            if layout in TARGET_LAYOUTS:
                growths.append((growth, call, layout))
            if growth > MAX_GROWTH:
                grown.append(f"`{call}` under {layout} {growth:.1f} times ({ms(first[call])} to {ms(last[call])} ms)")
    ranks = sorted({_case(record).ranks for record in records})
    if growths:
        growth, call, layout = max(growths)
        names = ", ".join(dict.fromkeys(layout for _, _, layout in growths))
        yield (
            f"**From {ranks[0]} to {ranks[-1]} ranks, {names}:** no call takes more than {growth:.2f} times as long "
            f"(`{call}` under {layout}). Calls of less than {1000 * NEGLIGIBLE_SECONDS:.0f} ms are not compared."
        )
    yield f"**`update()` on {ranks[-1]} ranks, {_case(records[0]).tensors} tensors:** {', '.join(updates)}."
    if grown:
        yield f"**What takes longer on more ranks:** {'; '.join(grown)}."


def _compared(seconds: Mapping[str, float]) -> list[str]:
    return [call for call, value in seconds.items() if value > NEGLIGIBLE_SECONDS]


def _case(record: Record) -> FakeCase:
    return FakeCase(**record["case"])


def _layout(record: Record) -> str:
    return _case(record).layout


def _rows(records: Sequence[Record]) -> Iterator[Sequence[str]]:
    layout = _layout(records[0])
    for call in records[0]["seconds"]:
        seconds = [record["seconds"][call] for record in records]
        yield layout, call, *map(ms, seconds), f"{seconds[-1] / seconds[0]:.2f}"
        layout = ""


def _growth_targets(records: Sequence[Record]) -> Iterator[Target]:
    for layout, group in groupby(records, _layout):
        first, *_, last = (record["seconds"] for record in group)
        if layout in TARGET_LAYOUTS:
            growths = {call: last[call] / first[call] for call in _compared(last)}
            slowest = max(growths, key=growths.__getitem__, default="")
            yield Target(f"{layout}: growth of any call ({slowest})", MAX_GROWTH, growths.get(slowest, 0), "times")


def _large_targets(large: Sequence[Record]) -> Iterator[Target]:
    for record in large:
        if _layout(record) in TARGET_LAYOUTS:
            for what, (calls, limit) in LIMITS.items():
                seconds = sum(record["seconds"][call] for call in calls)
                yield Target(f"{_layout(record)}, {LARGE_MODEL[1]} tensors: {what}", 1000 * limit, 1000 * seconds, "ms")


if __name__ == "__main__":
    main()
