"""A picture of what a run of the benchmark has found about updates."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.benchmark.average_report import PICTURE, AverageResults, update_case
from launch.benchmark.average_tables import SHORT, shown_ratio
from launch.benchmark.averaging_methods import FOREACH, OURS, OURS_COPY
from launch.benchmark.cases import Transformer
from launch.benchmark.results import times_reference
from launch.benchmark.updates import COPY, UpdateCosts

OUR_COLOR, FLOOR_COLOR, PEER_COLOR, LIMIT_COLOR = "#1f5fa8", "#7a7a7a", "#d3a07f", "#b0572c"
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
COLUMNS = 2


def write_picture(results: AverageResults, folder: Path) -> None:
    """Draw the large cases, small tensors, and four tracks."""
    chosen = [it for it in results.updates if isinstance(it.case.shape, Transformer) or it is results.updates[0]]
    chosen += [it for it in results.tracks if it.tracks == 4]
    rows = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(12, 0.6 + 2.7 * rows), dpi=130, layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes, costs in zip(grid, chosen, strict=False):
        _draw(axes, costs)
    for axes in list(grid)[len(chosen) :]:
        axes.set_axis_off()
    where = results.environment
    figure.suptitle(
        "Time of an update, in times that of a copy of as many bytes (dashed; shorter is better)\n"
        f"{where.gpu or where.cpu}, {where.threads} threads, torch {where.torch}, {where.date}",
        fontsize=11,
    )
    figure.savefig(folder / PICTURE)


def _draw(axes: Axes, costs: UpdateCosts) -> None:
    ratios = {name: ratio for name, ratio in times_reference(costs.seconds).items() if name != COPY}
    names = sorted(ratios, key=lambda name: ratios[name]) + list(costs.failures)
    widths = [ratios.get(name, 0.0) for name in names]
    colors = [OUR_COLOR if n in {OURS, OURS_COPY} else FLOOR_COLOR if n == FOREACH else PEER_COLOR for n in names]
    axes.barh(range(len(names)), widths, color=colors)
    furthest = max([1.0, *widths])
    for place, name in enumerate(names):
        color = "black" if name in ratios else LIMIT_COLOR
        end = ratios.get(name, 0.0) + 0.01 * furthest
        axes.text(end, place, shown_ratio(costs, name), va="center", fontsize=8, color=color, bbox=LABEL_BOX)
    axes.axvline(1, color=LIMIT_COLOR, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)), [SHORT[name] for name in names], fontsize=8)
    axes.set_xlim(0, 1.1 * furthest)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(update_case(costs), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
