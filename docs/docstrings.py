# ruff: noqa: INP001 - mkdocstrings loads this file by its path
"""Shows the labelled lines of docstrings (``Collective:``, ``Memory:``, ...) as lists, and finds what has none."""

from __future__ import annotations

import re
from collections.abc import Iterator

import griffe

LABEL = re.compile(r"(?:^|(?<=\.) )(Collective|Memory|Shape|Raises|Warns|Source): ", re.MULTILINE)
NAME = re.compile(r"(?<!`)`(\w+)`(?!`)")


class Contracts(griffe.Extension):
    """Rewrites the docstrings of public names; a missing one is a warning, and fails a strict build."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: object) -> None:
        """Runs once everything is read, and before any page is made of it."""
        objects = dict(_public_objects(pkg, loader))
        paths = {path.rpartition(".")[2]: path for path in objects}
        for path, obj in objects.items():
            if obj.docstring is None:
                griffe.logger.warning("%s is public and has no docstring", path)
            else:
                obj.docstring.value = linked(labelled(obj.docstring.value), paths, own_name=obj.name)


def labelled(docstring: str) -> str:
    """The labelled lines as Markdown definition lists."""
    return "\n\n".join(map(_labelled_paragraph, docstring.split("\n\n")))


def linked(docstring: str, paths: dict[str, str], *, own_name: str) -> str:
    """Public names in single backticks as links to their own entries."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        return f"[{match[0]}][{paths[name]}]" if name in paths and name != own_name else match[0]

    return NAME.sub(link, docstring)


def _labelled_paragraph(paragraph: str) -> str:
    before, *rest = LABEL.split(paragraph)
    texts = (" ".join(text.split()) for text in rest[1::2])
    entries = [f"{label}\n:   {text}" for label, text in zip(rest[::2], texts, strict=True)]
    return "\n\n".join([before.rstrip(), *entries] if before.strip() else entries or [paragraph])


def _public_objects(pkg: griffe.Module, loader: griffe.GriffeLoader) -> Iterator[tuple[str, griffe.Object]]:
    """The package, what its ``__all__`` names, and public methods and properties in there, by the paths users write."""
    yield pkg.path, pkg
    for name in pkg.exports or ():
        member = pkg[str(name)]
        obj = loader.modules_collection[member.target_path] if member.is_alias else member
        yield f"{pkg.path}.{name}", obj
        for inner in obj.members.values() if obj.is_class else ():
            if not inner.name.startswith("_") and (inner.is_function or "property" in inner.labels):
                yield f"{pkg.path}.{name}.{inner.name}", inner
