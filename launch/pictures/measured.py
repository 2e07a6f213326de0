"""Charts of recorded numbers: the curves of the recipe, memory against ranks."""

import json
from pathlib import Path
from typing import Any

from launch.pictures.canvas import Canvas
from launch.pictures.charts import Axis, Frame, Line, line_chart

MIB = 2**20
FIRST_EPOCH = 3
"""The first epoch of the curves. Accuracies before it are far lower, and would hide the differences after it."""


def curves_picture(record: Path) -> Canvas:
    """Test accuracy after each epoch of ``launch/train.py``, live and averaged."""
    recorded = json.loads(record.read_text())
    rows: list[dict[str, float]] = recorded["epochs"]
    last = rows[-1]
    canvas = Canvas(
        680,
        402,
        f"Test accuracy after {last['epoch']} epochs: {last['live_accuracy']:.1%} with the live weights, "
        f"{last['average_accuracy']:.1%} with the averages",
    )
    lines = [
        Line(
            f"{word} {last[key]:.1%}",
            [(row["epoch"], 100 * row[key]) for row in rows if row["epoch"] >= FIRST_EPOCH],
            color,
            dots=True,
        )
        for word, key, color in (("average", "average_accuracy", "average"), ("live", "live_accuracy", "live"))
    ]
    line_chart(
        canvas,
        Frame(74, 52, 456, 260),
        f"Test accuracy of one run from epoch {FIRST_EPOCH} on: live and averaged weights",
        lines,
        x=Axis("epoch", FIRST_EPOCH, last["epoch"], [FIRST_EPOCH, 6, 12, 18, last["epoch"]]),
        y=Axis("", 60, 100, [60, 70, 80, 90, 100], "{:g} %".format),
    )
    canvas.text(
        20,
        388,
        f"{recorded['parameters']:,} parameters, 8x8 images of digits; {recorded['environment']['date']}",
        color="muted",
    )
    return canvas


def cost_picture(record: Path) -> Canvas:
    """Measured bytes of float32 averages on the first rank, by layout and ranks."""
    recorded: dict[str, Any] = json.loads(record.read_text())
    costs = [it for it in recorded["costs"] if it["case"]["live"] == "float32" and it["tracks"] == 1]
    elements = costs[0]["elements"]

    def line(label: str, parallel: str, *, split: bool, color: str) -> Line:
        points = {1: 4 * elements / MIB} | {
            it["case"]["ranks"]: it["held_bytes"]["measured"][0] / MIB
            for it in costs
            if it["case"]["parallel"] == parallel and it["sharding"]["split"] == split
        }
        return Line(label, sorted(points.items()), color, dots=True, dashed=not split)

    largest = 4 * elements / MIB
    canvas = Canvas(680, 400, "Memory of averages on one rank against the number of ranks")
    line_chart(
        canvas,
        Frame(74, 52, 370, 260),
        f"MiB of float32 averages on the first rank, {elements / 1e6:.0f}M parameters",
        [
            line('DDP, replicas="copy"', "ddp", split=False, color="live"),
            line('HSDP, replicas="copy"', "hsdp", split=False, color="violet"),
            line("DDP, FSDP2, HSDP", "fsdp2", split=True, color="average"),
        ],
        x=Axis("ranks", 1, 4, [1, 2, 4], log=True),
        y=Axis("", 0, 1.05 * largest, range(0, int(largest) + 1, 50)),
    )
    where = recorded["environment"]
    canvas.text(20, 388, f"measured on {where['date']}, torch {where['torch']}: launch.cost", color="muted")
    return canvas
