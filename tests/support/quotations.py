"""Pages of the documentation quote what the library prints; tests compare the quotations, or rewrite them.

A quotation is a block of text below a comment: ``<!-- message: NAME -->``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path


def quotations(page: Path, kind: str) -> dict[str, str]:
    """The quoted texts of a page by name."""
    return dict(_pattern(kind, r"(\w+)").findall(page.read_text()))


def quoted(page: Path, kind: str, name: str, text: str) -> str:
    """The text that a page quotes under a name; with ``RECORD=1``, `text` is first written to the page."""
    if os.environ.get("RECORD"):
        block = f"<!-- {kind}: {name} -->\n\n```text\n{text}\n```"
        page.write_text(_pattern(kind, name).sub(lambda _: block, page.read_text()))
    return quotations(page, kind)[name]


def _pattern(kind: str, name: str) -> re.Pattern[str]:
    return re.compile(rf"^<!-- {kind}: {name} -->\n\n?```text\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
