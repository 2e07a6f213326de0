# ruff: noqa: INP001 - mkdocs loads this file by its path
"""Adds a page for each notebook: its text, its code, and what the code printed when the notebook was recorded."""

import json
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, /, *, config: MkDocsConfig) -> Files:
    """Called by mkdocs with the files that it has found."""
    for notebook in Path(config.docs_dir).glob("*.ipynb"):
        page = "\n\n".join(as_markdown(notebook))
        files.append(File.generated(config, f"{notebook.stem}.md", content=page))
    return files


def as_markdown(notebook: Path) -> Iterator[str]:
    """The cells in their order; then a link to the notebook itself."""
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        for output in cell.get("outputs", ()):
            yield f"```text\n{''.join(output['text']).rstrip()}\n```"
    yield f"This page is a notebook: [{notebook.name}]({notebook.name})."
