"""``ema-dist inspect``: what is in a checkpoint."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ema_dist.checkpoint.dcp.index import Outline, Track, dotted
from ema_dist.checkpoint.folders import locate
from ema_dist.checkpoint.stored_checkpoint import Averages, SavedDecay, Stored
from ema_dist.checkpoint.values import Path as Place
from ema_dist.cli.distance import distance
from ema_dist.cli.options import CheckpointArgument, StepOption
from ema_dist.cli.terminal import in_bytes, output, progress

BAR = 10
"""Columns of the bar that shows the largest distance."""


def inspect(
    checkpoint: CheckpointArgument,
    *,
    step: StepOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """Show what is in a checkpoint: step, layouts, tracks, decays, tensors, and how far averages are from live weights.

    The distance of an average is |average - live| / |live|, in Euclidean norms.

    The keys of --json: path, step and saved (null after plain dcp.save; else world_size, torch, layouts by entry),
    entries (by name: kind, tensors, pieces, bytes), averages (by entry: model, steps, updates, tracks by name: decay,
    averages and distances by tensor), tensors (by name: shape, dtype, bytes, pieces). Numbers that are not finite are
    strings.
    """
    stored = Stored(locate(checkpoint, step))
    facts = _facts(stored)
    if as_json:
        typer.echo(json.dumps(_finite(facts), indent=1, allow_nan=False))
        return
    _show_head(facts)
    _show_entries(facts)
    models = {dotted(place): tensors for place, tensors in stored.outline.models.items()}
    for entry, averages in facts["averages"].items():
        for name, track in averages["tracks"].items():
            beside = f", beside {_named(averages['model'])}" if averages["model"] in models else ""
            live = models.get(averages["model"], {})
            title = f"averages {_named(entry)}, track {name}{beside}"
            _show_tensors(title, stored.outline, live, averages=track["averages"], distances=track["distances"])
    shown = {averages["model"] for averages in facts["averages"].values()}
    for entry in models.keys() - shown:
        _show_tensors(f"model {_named(entry)}", stored.outline, models[entry], averages={}, distances={})


def _facts(stored: Stored) -> dict[str, Any]:
    """What ``--json`` prints."""
    outline, manifest = stored.outline, stored.manifest
    entries = {
        dotted(place): {
            "kind": kind,
            **_sums(outline, [name for name in outline.under(place) if name in outline.tensors]),
        }
        for place, kind in outline.entries()
    }
    return {
        "path": str(stored.folder),
        "step": manifest.step if manifest else None,
        "saved": {"world_size": manifest.world_size, "torch": manifest.torch, "layouts": manifest.layouts}
        if manifest
        else None,
        "entries": entries,
        "averages": {dotted(place): _averages(stored, averages) for place, averages in stored.averages.items()},
        "tensors": {
            name: {
                "shape": list(outline.shape(name)),
                "dtype": _dtype(outline, name),
                "bytes": outline.nbytes(name),
                "pieces": outline.pieces(name),
            }
            for name in outline.tensors
        },
    }


def _sums(outline: Outline, names: list[str]) -> dict[str, Any]:
    return {
        "tensors": len(names),
        "pieces": sum(map(outline.pieces, names)),
        "bytes": sum(map(outline.nbytes, names)),
        "dtypes": dict(Counter(_dtype(outline, name) for name in names)),
    }


def _averages(stored: Stored, averages: Averages) -> dict[str, Any]:
    model = next(iter(stored.models_of(averages.place)), None)
    return {
        "model": None if model is None else dotted(model),
        "steps": averages.steps,
        "updates": averages.updates,
        "tracks": {
            name: {"decay": _decay(averages.decays[name]), **_compared(stored, track, model)}
            for name, track in averages.tracks.items()
        },
    }


def _decay(decay: SavedDecay) -> dict[str, Any]:
    return {**decay.decay.state(), "half_life": decay.half_life, "decay": decay.per_unit, "per": decay.unit}


def _compared(stored: Stored, track: Track, model: Place | None) -> dict[str, dict[str, Any]]:
    """The average of each tensor, and how far it is from the live one, in the model's order."""
    if model is None:
        return {"averages": track.all, "distances": {}}
    outline = stored.outline
    live, averages = outline.models[model], stored.averages_for(model, track)
    fitting = [name for name, average in averages.items() if outline.shape(average) == outline.shape(live[name])]
    names = [name for pair in ((averages[name], live[name]) for name in fitting) for name in pair]
    with progress("comparing", sum(map(outline.nbytes, names))) as advance:
        tensors = stored.stream(names, on_bytes=advance)
        distances = {name: distance(other=next(tensors), reference=next(tensors)).norm for name in fitting}
    return {"averages": averages, "distances": distances}


def _show_head(facts: Mapping[str, Any]) -> None:
    for label, text in _head(facts):
        output().print(f"[bold]{label:<12}[/]{escape(text)}", soft_wrap=True)


def _head(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "checkpoint", facts["path"]
    if saved := facts["saved"]:
        ranks = saved["world_size"]
        yield "step", str(facts["step"])
        yield "saved by", f"{ranks} {'rank' if ranks == 1 else 'ranks'}, torch {saved['torch']}"
        for entry, layout in saved["layouts"].items():
            yield "layout", f"{entry}: {layout}"
    else:
        pieces = max((tensor["pieces"] for tensor in facts["tensors"].values()), default=0)
        yield "saved by", f"plain dcp.save (no manifest), tensors in at most {pieces} pieces each"
    for entry, averages in facts["averages"].items():
        for name, track in averages["tracks"].items():
            decay = track["decay"]
            half_life = f"half-life {decay['half_life']:,.6g} {decay['per']}s"
            counts = f"{averages['steps']:,} steps, {averages['updates']:,} updates"
            per_unit = f"decay {decay['decay']:.9g} per {decay['per']}"
            yield "averages", f"{_named(entry)}, track {name}: {half_life} ({per_unit}), {counts}"


def _show_entries(facts: Mapping[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("entry", overflow="fold")
    table.add_column("kind", overflow="fold")
    for header in ("tensors", "pieces", "size"):
        table.add_column(header, justify="right", overflow="fold")
    table.add_column("dtypes", overflow="fold")
    for name, entry in facts["entries"].items():
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in entry["dtypes"].items())
        table.add_row(
            escape(_named(name)),
            entry["kind"],
            str(entry["tensors"]),
            str(entry["pieces"]),
            in_bytes(entry["bytes"]),
            dtypes,
        )
    total = sum(tensor["bytes"] for tensor in facts["tensors"].values())
    table.add_section()
    pieces = sum(tensor["pieces"] for tensor in facts["tensors"].values())
    table.add_row("total", "", str(len(facts["tensors"])), str(pieces), in_bytes(total), "")
    output().print(table)


def _show_tensors(
    title: str,
    outline: Outline,
    live: Mapping[str, str],
    *,
    averages: Mapping[str, str],
    distances: Mapping[str, float],
) -> None:
    """One row for each tensor of a model, or of its averages alone."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", justify="right", overflow="fold")
    table.add_column("dtype", overflow="fold")
    table.add_column("size", justify="right", overflow="fold")
    if averages:
        table.add_column("average", overflow="fold")
    if distances:
        table.add_column("distance", justify="right", overflow="fold")
        table.add_column("", width=BAR)
    longest = max((it for it in distances.values() if math.isfinite(it)), default=0.0)
    for name in {**live, **averages}:
        main = live.get(name) or averages[name]
        row = [
            escape(name),
            " x ".join(map(str, outline.shape(main))) or "scalar",
            _dtype(outline, live[name]) if name in live else "",
            in_bytes(outline.nbytes(main)),
        ]
        if averages:
            row.append(_dtype(outline, averages[name]) if name in averages else "[dim]none[/]")
        if distances:
            far = distances.get(name)
            row += ["", ""] if far is None else [f"{far:.3g}", _bar(far, longest)]
        table.add_row(*row)
    output().print(table)


def _bar(far: float, longest: float) -> str:
    if not math.isfinite(far):
        return "[red]" + "!" * BAR
    return "[cyan]" + "━" * (math.ceil(BAR * far / longest) if longest else 0)


def _named(entry: str) -> str:
    return entry or "(the checkpoint itself)"


def _dtype(outline: Outline, name: str) -> str:
    return str(outline.dtype(name)).removeprefix("torch.")


def _finite(facts: Any) -> Any:  # noqa: ANN401  JSON
    """The same, without the numbers that JSON has no words for."""
    match facts:
        case dict():
            return {key: _finite(value) for key, value in facts.items()}
        case list():
            return [_finite(value) for value in facts]
        case float() if not math.isfinite(facts):
            return str(facts)
    return facts
