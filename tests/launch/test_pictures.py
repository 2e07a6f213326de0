"""`python -m launch.pictures`: the pictures in docs/ are those that it draws, and their text can be read."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from launch.pictures.__main__ import DOCS, PICTURES
from launch.pictures.charts import spread

COMMITTED = [*PICTURES, *(f"benchmarks/{name}.svg" for name in ("results", "checkpoints", "composer"))]
SMALLEST_PX = 16
"""12 pt. On a phone pictures are 510 px wide, three quarters of their size, and then it is 9 pt."""


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_in_the_documentation_is_the_drawn_one(name: str) -> None:
    assert (DOCS / name).read_text() == PICTURES[name]().as_svg(), "run: python -m launch.pictures"


@pytest.mark.parametrize("name", COMMITTED)
def test_pictures_are_described_and_their_text_is_large_enough(name: str) -> None:
    text = (DOCS / name).read_text()
    root = ET.fromstring(text)
    assert root.findtext("{*}title")
    assert int(root.get("width", "0")) <= 680
    assert min(map(int, re.findall(r"font-size:(\d+)px", text))) >= SMALLEST_PX
    assert "prefers-color-scheme:dark" in text


@pytest.mark.parametrize("name", COMMITTED)
def test_pictures_are_on_a_page(name: str) -> None:
    pages = [path.read_text() for path in (Path(DOCS).parent / "README.md", *Path(DOCS).rglob("*.md"))]
    assert any(f"{Path(name).name})" in page for page in pages)


def test_labels_keep_their_distance_and_their_order() -> None:
    assert spread([0, 1, 50], 20) == [-9.5, 10.5, 50]
    assert spread([90, 99, 100], 10, lowest=100) == [80, 90, 100]
