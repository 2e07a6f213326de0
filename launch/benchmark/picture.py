"""A figure of the times of updates, and the names of methods in it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from launch.benchmark.averaging_methods import FOREACH, OURS, OURS_AUTO, OURS_COPY, SHORT_NAMES
from launch.benchmark.cases import Transformer
from launch.benchmark.measure import Record
from launch.benchmark.page import Environment, Picture
from launch.benchmark.updates import COPY, NOT_INSTALLED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PEER_COLOR, LIMIT_COLOR = "#d3a07f", "#b0572c"
COLORS = {OURS: "#1f5fa8", OURS_AUTO: "#1f5fa8", OURS_COPY: "#1f5fa8", FOREACH: "#7a7a7a"}
COLUMNS = 2


def update_picture(updates: Sequence[Record], tracks: Sequence[Record], environment: Environment) -> Picture:
    """The large cases, small tensors, and four tracks."""
    chosen = [it for it in updates if isinstance(it["case"].shape, Transformer) or it is updates[0]]
    chosen += [it for it in tracks if it["tracks"] == 4]
    rows = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(12, 0.6 + 2.7 * rows), dpi=130, layout="constrained")
    grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, update in zip(grid, chosen, strict=False):
        _draw(axes, update)
    for axes in grid[len(chosen) :]:
        axes.set_axis_off()
    figure.suptitle(
        "Time of an update, in times that of a copy of as many bytes (dashed; shorter is better)\n"
        f"{environment.gpu or environment.cpu}, {environment.threads} threads, torch {environment.torch}, "
        f"{environment.date}",
        fontsize=11,
    )
    return Picture("results.png", "Time of an update by each way, in each case", figure)


def update_case(update: Record) -> str:
    return str(update["case"]) + (f", {update['tracks']} tracks" if update["tracks"] > 1 else "")


def ratio_text(update: Record, name: str) -> str:
    """The ratio to the copy; or that the method fails or is missing, or nothing where it does not apply."""
    if name in update["seconds"]:
        return f"{update['times_reference'][name]:.2f}"
    if name in update["failures"]:
        return "missing" if update["failures"][name].startswith(NOT_INSTALLED) else "fails"
    return ""


def _draw(axes: "Axes", update: Record) -> None:
    ratios = {name: ratio for name, ratio in update["times_reference"].items() if name != COPY}
    names = sorted(ratios, key=lambda name: ratios[name]) + list(update["failures"])
    colors = [COLORS.get(name, PEER_COLOR) for name in names]
    bars = axes.barh([SHORT_NAMES[name] for name in names], [ratios.get(name, 0.0) for name in names], color=colors)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    labels = axes.bar_label(bars, [ratio_text(update, name) for name in names], padding=3)
    for name, label in zip(names, labels, strict=True):
        label.set(fontsize=8, bbox=box, color="black" if name in ratios else LIMIT_COLOR)
    axes.axvline(1, color=LIMIT_COLOR, linestyle="--", linewidth=1)
    axes.set_xlim(0, 1.1 * max([1.0, *ratios.values()]))
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_title(update_case(update), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
