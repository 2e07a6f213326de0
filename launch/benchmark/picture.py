"""Pictures of times and memory, with a bar for each method, and texts that the pages share."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from launch.benchmark.averaging_methods import OURS
from launch.benchmark.cases import Transformer
from launch.benchmark.measure import Record
from launch.benchmark.page import MIB, Environment, Picture, ms
from launch.benchmark.updates import COPY, NOT_INSTALLED
from launch.pictures.canvas import Canvas
from launch.pictures.charts import Bar, bar_chart

LABEL_WIDTH = 276


def averages_picture(updates: Sequence[Record], swaps: Sequence[Record], environment: Environment) -> Picture:
    """The large model under DDP and FSDP2: times of an update, memory, and times of a swap."""
    canvas = Canvas(680, 0, "Time and memory of an update by each way to average, under DDP and FSDP2")
    top = 12.0
    for parallel in ("ddp", "fsdp2"):
        update = large_update(updates, parallel)
        if update is None:
            continue
        name = f"{update['case'].layout}, {update['elements'] / 1e6:.1f}M parameters"
        seconds = {
            method: statistics.median(samples) for method, samples in update["seconds"].items() if method != COPY
        }
        memory = {method: held + update["extra_bytes"][method] for method, held in update["held_bytes"].items()}
        fails = [Bar(method, None, ratio_text(update, method)) for method in update["failures"]]
        title = f"{name}: ms of an update"
        top = 14 + bar_chart(canvas, top, title, [*bars(seconds, ms, (OURS,)), *fails], label_width=LABEL_WIDTH)
        title = f"{name}: MiB kept, and added by an update"
        top = 14 + bar_chart(canvas, top, title, bars(memory, whole_mib, (OURS,)), label_width=LABEL_WIDTH)
    for swap in swaps:
        if swap["case"].parallel == "ddp" and isinstance(swap["case"].shape, Transformer):
            memory = {name: held + swap["extra_bytes"][name] for name, held in swap["held_bytes"].items()}
            title = f"{swap['case'].layout}: MiB to evaluate with the averages"
            top = 14 + bar_chart(canvas, top, title, bars(memory, whole_mib, (OURS,)), label_width=LABEL_WIDTH)
    return Picture("results.svg", finish(canvas, top, environment))


def bars(values: Mapping[str, float], show: Callable[[float], str], ours: tuple[str, ...]) -> list[Bar]:
    """Bars from the shortest to the longest; those whose names start with one of `ours` have our color."""
    return [
        Bar(name, value, show(value), "average" if name.startswith(ours) else "muted")
        for name, value in sorted(values.items(), key=lambda item: item[1])
    ]


def whole_mib(size: float) -> str:
    return f"{size / MIB:.0f}"


def finish(canvas: Canvas, top: float, environment: Environment) -> Canvas:
    """The canvas, cropped below the last chart, with a line that says where it was measured."""
    where = environment.gpu or f"{environment.cpu}, {environment.threads} threads"
    canvas.text(16, top + 16, f"{where}, torch {environment.torch}, {environment.date}", color="muted")
    canvas.height = int(top + 36)
    return canvas


def large_update(updates: Sequence[Record], parallel: str) -> Record | None:
    """The update of the large model in float32 under a layout."""
    for update in updates:
        case = update["case"]
        if (case.parallel, case.live) == (parallel, "float32") and isinstance(case.shape, Transformer):
            return update
    return None


def update_case(update: Record) -> str:
    return str(update["case"]) + (f", {update['tracks']} tracks" if update["tracks"] > 1 else "")


def ratio_text(update: Record, name: str) -> str:
    """The ratio to the copy, `fails`, `missing`, or an empty text if the method does not apply."""
    if name in update["seconds"]:
        return f"{update['times_reference'][name]:.2f}"
    if name in update["failures"]:
        return "missing" if update["failures"][name].startswith(NOT_INSTALLED) else "fails"
    return ""
