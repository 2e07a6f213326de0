"""Line charts with a label at the end of each line, and bars with their values."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.pictures.canvas import Canvas, text_width

LINE_HEIGHT = 20
BAR_HEIGHT = 26


@dataclass(frozen=True)
class Axis:
    """A range of values with ticks, and a label.

    Args:
        log: whether the scale is logarithmic; the range must then be positive.
    """

    label: str
    first: float
    last: float
    ticks: Sequence[float]
    show: Callable[[float], str] = "{:g}".format
    log: bool = False

    def fraction(self, value: float) -> float:
        """The position of a value, limited to the axis: 0 at its start, 1 at its end."""
        value = min(max(value, self.first), self.last)
        if self.log:
            return math.log(value / self.first) / math.log(self.last / self.first)
        return (value - self.first) / (self.last - self.first)


@dataclass(frozen=True)
class Line:
    """A line, its label, and whether its points are marked."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    dots: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar with a text at its end; without a value, the text only."""

    label: str
    value: float | None
    text: str
    color: str = "muted"


@dataclass(frozen=True)
class Frame:
    """The area of a chart's plot on the canvas, without labels."""

    left: float
    top: float
    width: float
    height: float


def line_chart(canvas: Canvas, frame: Frame, title: str, lines: Sequence[Line], *, x: Axis, y: Axis) -> None:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    canvas.text(20, frame.top - 16, title, bold=True)
    for tick in y.ticks:
        height = bottom - y.fraction(tick) * frame.height
        canvas.line([(frame.left, height), (right, height)], color="grid", width=1)
        canvas.text(frame.left - 8, height + 5, y.show(tick), color="muted", anchor="end")
    for tick in x.ticks:
        position = frame.left + x.fraction(tick) * frame.width
        canvas.line([(position, bottom), (position, bottom + 5)], color="muted", width=1)
        canvas.text(position, bottom + 23, x.show(tick), color="muted", anchor="middle")
    canvas.text(frame.left + frame.width / 2, bottom + 46, x.label, color="muted", anchor="middle")
    ends: list[tuple[float, Line]] = []
    for line in lines:
        points = [
            (frame.left + x.fraction(across) * frame.width, bottom - y.fraction(up) * frame.height)
            for across, up in line.points
        ]
        canvas.line(points, color=line.color, width=2.5, dashed=line.dashed)
        for point in points if line.dots else ():
            canvas.dot(*point, color=line.color)
        ends.append((points[-1][1], line))
    ends.sort(key=lambda end: end[0])
    heights = spread([end[0] for end in ends], LINE_HEIGHT, lowest=bottom - 2)
    for height, (_, line) in zip(heights, ends, strict=True):
        canvas.text(right + 10, height + 5, line.label, color=line.color)


def bar_chart(canvas: Canvas, top: float, title: str, bars: Sequence[Bar], *, label_width: float) -> float:
    """Draw horizontal bars over the width of the canvas; returns the y coordinate below them."""
    canvas.text(16, top + 16, title, bold=True)
    text = max(text_width(bar.text) for bar in bars) + 14
    longest = max(bar.value or 0.0 for bar in bars)
    room = canvas.width - 16 - label_width - text - 12
    y = top + 32
    for bar in bars:
        canvas.text(16, y + 17, bar.label, color=bar.color if bar.color != "muted" else "ink")
        length = room * (bar.value or 0.0) / longest
        if bar.value is not None:
            canvas.rectangle(16 + label_width, y + 3, max(2.0, length), BAR_HEIGHT - 8, fill=bar.color)
        canvas.text(16 + label_width + length + 8, y + 17, bar.text, color="ink" if bar.value is not None else "muted")
        y += BAR_HEIGHT
    return y


def spread(heights: Sequence[float], distance: float, *, lowest: float = math.inf) -> list[float]:
    """Move sorted heights as little as needed to be at least `distance` apart, and none beyond `lowest`."""
    groups: list[tuple[float, int]] = []  # the mean of the heights in a group, and their number
    for height in heights:
        groups.append((height, 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < distance * (groups[-1][1] + groups[-2][1]) / 2:
            (last, count), (before, before_count) = groups.pop(), groups.pop()
            together = count + before_count
            groups.append(((last * count + before * before_count) / together, together))
    apart = [mean + distance * (index - (count - 1) / 2) for mean, count in groups for index in range(count)]
    limits = [lowest - distance * index for index in range(len(apart))]
    return [min(height, limit) for height, limit in zip(apart, reversed(limits), strict=True)]
