# ruff: noqa: INP001 - mkdocstrings loads this file by its path
"""Shows the labelled lines of docstrings (``Collective:``, ``Memory:``, ...) as lists, and finds what has none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import griffe

API_PAGES = Path(__file__).parent / "api"

LABEL = re.compile(r"(?:^|(?<=\.) )(Collective|Memory|Shape|Raises|Warns|Source): ", re.MULTILINE)
FOR_MAINTAINERS = re.compile(r"\bMay import\b|^No module here")
NAME = re.compile(r"(?<!`)`(\w+)`(?!`)")


class Contracts(griffe.Extension):
    """Rewrites the docstrings of public names; a missing one is a warning, and fails a strict build."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: object) -> None:
        """Runs once everything is read, and before any page is made of it."""
        modules = [pkg, *(pkg[page.stem] for page in sorted(API_PAGES.glob("*.md")) if page.stem != "index")]
        paths: dict[str, str] = {}
        rewritten: set[str] = set()
        for module in modules:
            objects = dict(_public_objects(module, loader))
            own_paths = {path.rpartition(".")[2]: path for path in objects}
            paths = paths or own_paths
            for path, obj in objects.items():
                if obj.path in rewritten:  # inherited by two classes, or in the __all__ of two modules
                    continue
                rewritten.add(obj.path)
                if obj.is_module and obj.docstring is not None:
                    obj.docstring.value = for_users(obj.docstring.value)
                if obj.docstring is None:
                    griffe.logger.warning("%s is public and has no docstring", path)
                else:
                    obj.docstring.value = linked(labelled(obj.docstring.value), paths | own_paths, own_name=obj.name)


def for_users(docstring: str) -> str:
    """The docstring of a package without the paragraph about what belongs there and what it may import."""
    return "\n\n".join(paragraph for paragraph in docstring.split("\n\n") if not FOR_MAINTAINERS.search(paragraph))


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


def _public_objects(module: griffe.Module, loader: griffe.GriffeLoader) -> Iterator[tuple[str, griffe.Object]]:
    """The module, what its ``__all__`` names, and public methods and properties in there, by the paths users write."""
    yield module.path, module
    for name in module.exports or ():
        member = module[str(name)]
        obj = loader.modules_collection[member.target_path] if member.is_alias else member
        yield f"{module.path}.{name}", obj
        for inner in (obj.members | obj.inherited_members).values() if obj.is_class else ():
            if inner.is_alias and not inner.target_path.startswith("ema_dist."):
                continue
            if not inner.name.startswith("_") and (inner.is_function or "property" in inner.labels):
                yield f"{module.path}.{name}.{inner.name}", inner.final_target if inner.is_alias else inner
