"""An SVG drawing of rectangles, lines and text, in colours that are named by what they stand for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

Anchor = Literal["start", "middle", "end"]
FONT_PX = 16
"""12 pt. On a phone, pictures shrink to no less than three quarters, which makes 9 pt, and then scroll."""
CHARACTER_PX = 8.8
"""Mean width of a character in a wide font (DejaVu Sans)."""
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2430",
    "muted": "#5b6270",
    "grid": "#dfe2e8",
    "empty": "#f1f2f5",
    "live": "#b0572c",
    "live-fill": "#efc3a8",
    "average": "#1f5fa8",
    "average-fill": "#a9c8ea",
    "green": "#2f7d4f",
    "violet": "#7a4fa3",
    "red": "#b3364b",
    "teal": "#137a7f",
    "olive": "#77701c",
    "brown": "#7d5a3c",
    "rose": "#b0468f",
}
DARK = {
    "paper": "#22252e",
    "ink": "#e7e9ef",
    "muted": "#aab0bd",
    "grid": "#3b404d",
    "empty": "#2c303b",
    "live": "#f0a37c",
    "live-fill": "#8f4a28",
    "average": "#86b9f2",
    "average-fill": "#2b5c94",
    "green": "#7fcf9d",
    "violet": "#c3a0ea",
    "red": "#f28b9c",
    "teal": "#6fcfd3",
    "olive": "#d6cd6c",
    "brown": "#d2ab88",
    "rose": "#eb96d0",
}


@dataclass
class Canvas:
    """A picture with its size in px, and a description for readers who cannot see it."""

    width: int
    height: int
    description: str
    _elements: list[str] = field(default_factory=list)

    def rectangle(
        self, x: float, y: float, width: float, height: float, *, fill: str, outline: str | None = None
    ) -> None:
        stroke = f"stroke:var(--{outline})" if outline else "stroke:none"
        size = f'x="{x:g}" y="{y:g}" width="{round(width, 2):g}" height="{round(height, 2):g}"'
        self._elements.append(f'<rect {size} style="fill:var(--{fill});{stroke}"/>')

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        color: str = "ink",
        anchor: Anchor = "start",
        bold: bool = False,
        mono: bool = False,
    ) -> None:
        """A line of text; `y` is its baseline."""
        style = f"fill:var(--{color})" + (";font-weight:600" if bold else "")
        style += ";font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace" if mono else ""
        place = f'x="{round(x, 1):g}" y="{round(y, 1):g}" text-anchor="{anchor}"'
        self._elements.append(f'<text {place} style="{style}">{escape(text)}</text>')

    def line(
        self, points: Iterable[tuple[float, float]], *, color: str, width: float = 2, dashed: bool = False
    ) -> None:
        dashes = ";stroke-dasharray:5 5" if dashed else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        style = f"fill:none;stroke:var(--{color});stroke-width:{width:g};stroke-linejoin:round{dashes}"
        self._elements.append(f'<polyline points="{path}" style="{style}"/>')

    def dot(self, x: float, y: float, *, color: str) -> None:
        self._elements.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:var(--{color})"/>')

    def arrow(self, start: tuple[float, float], end: tuple[float, float], *, color: str = "ink") -> None:
        """A horizontal or vertical line with a head at `end`."""
        (x0, y0), (x1, y1) = start, end
        step_x, step_y = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        self.line([start, (x1 - 4 * step_x, y1 - 4 * step_y)], color=color)
        base_x, base_y = x1 - 9 * step_x, y1 - 9 * step_y
        across_x, across_y = 5 * step_y, 5 * step_x
        corners = [(x1, y1), (base_x + across_x, base_y + across_y), (base_x - across_x, base_y - across_y)]
        points = " ".join(f"{x:g},{y:g}" for x, y in corners)
        self._elements.append(f'<polygon points="{points}" style="fill:var(--{color})"/>')

    def paragraph(self, x: float, y: float, lines: Sequence[str], *, color: str = "ink") -> None:
        for number, line in enumerate(lines):
            self.text(x, y + 22 * number, line, color=color)

    def as_svg(self) -> str:
        """The SVG file. It includes the background, so that it is readable on a page with the other scheme, too."""
        light, dark = (";".join(f"--{name}:{value}" for name, value in colors.items()) for colors in (LIGHT, DARK))
        style = (
            f"svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
            f"text{{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;"
            f"font-size:{FONT_PX}px}}"
        )
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
                f"<title>{escape(self.description)}</title>",
                f"<style>{style}</style>",
                '<rect width="100%" height="100%" rx="8" style="fill:var(--paper)"/>',
                *self._elements,
                "</svg>\n",
            ]
        )


def text_width(text: str) -> float:
    """The approximate width of a text in px."""
    return CHARACTER_PX * len(text)
