"""``ema-dist inspect``: lists the contents of a checkpoint, and how far averages are from live weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ema_dist.checkpoint.dcp.checkpoint_index import CheckpointIndex, TrackNames, dotted_name
from ema_dist.checkpoint.find_checkpoint import find_checkpoint
from ema_dist.checkpoint.stored_checkpoint import StoredAverages, StoredCheckpoint, StoredDecay
from ema_dist.checkpoint.values import KeyPath
from ema_dist.cli.distance import distance
from ema_dist.cli.terminal import format_bytes, print_json, print_table, progress, stdout_console
from ema_dist.schedules.decay import UNRECORDED

BAR_COLUMNS = 10
"""The width of the bar for the largest distance."""
PLURALS = {"step": "steps", "unit of time": "units of time", "update": "updates"}
"""The plurals of `StoredDecay.unit`."""


def inspect(checkpoint: Path, *, step: int | None = None, as_json: bool = False) -> None:
    """Prints the contents of a checkpoint, as tables or as one JSON object."""
    stored = StoredCheckpoint(find_checkpoint(checkpoint, step))
    summary = _summarize(stored)
    if as_json:
        print_json(summary)
        return
    _print_header(summary, stored)
    _print_entries(summary)
    models = {dotted_name(key_path): tensors for key_path, tensors in stored.index.models.items()}
    for entry, averages in summary["averages"].items():
        for name, track in averages["tracks"].items():
            model_note = f", beside {_entry_label(averages['model'])}" if averages["model"] in models else ""
            live = models.get(averages["model"], {})
            title = f"averages {_entry_label(entry)}, track {name}{model_note}"
            _print_tensors(title, stored.index, live, averages=track["averages"], distances=track["distances"])
    shown_models = {averages["model"] for averages in summary["averages"].values()}
    for entry in [entry for entry in models if entry not in shown_models]:
        _print_tensors(f"model {_entry_label(entry)}", stored.index, models[entry], averages={}, distances={})


def _summarize(stored: StoredCheckpoint) -> dict[str, Any]:
    """The object that ``--json`` prints; its keys are in the help text."""
    index, manifest = stored.index, stored.manifest
    entries = {
        dotted_name(key_path): {
            "kind": kind,
            **_totals(index, [name for name in names if name in index.tensors]),
        }
        for key_path, kind, names in index.names_by_entry()
    }
    return {
        "path": str(stored.folder),
        "step": manifest.step if manifest else None,
        "saved": {"world_size": manifest.world_size, "torch": manifest.torch, "layouts": manifest.layouts}
        if manifest
        else None,
        "entries": entries,
        "averages": {
            dotted_name(key_path): _summarize_averages(stored, averages)
            for key_path, averages in stored.averages.items()
        },
        "tensors": {
            name: {
                "shape": list(index.shape(name)),
                "dtype": _dtype_name(index, name),
                "bytes": index.nbytes(name),
                "pieces": index.num_chunks(name),
            }
            for name in index.tensors
        },
    }


def _totals(index: CheckpointIndex, names: list[str]) -> dict[str, Any]:
    return {
        "tensors": len(names),
        "pieces": sum(map(index.num_chunks, names)),
        "bytes": sum(map(index.nbytes, names)),
        "dtypes": dict(Counter(_dtype_name(index, name) for name in names)),
    }


def _summarize_averages(stored: StoredCheckpoint, averages: StoredAverages) -> dict[str, Any]:
    model = next(iter(stored.matching_models(averages.key_path)), None)
    return {
        "model": None if model is None else dotted_name(model),
        "steps": averages.steps,
        "updates": averages.updates,
        "time": averages.clock.time,
        "tracks": {
            name: {
                "decay": _summarize_decay(averages.decays[name]),
                "initial_mass": averages.clock.initial_masses[name],
                **_compare_with_live(stored, track, model),
            }
            for name, track in averages.tracks.items()
        },
    }


def _summarize_decay(stored: StoredDecay) -> dict[str, Any]:
    return {
        "kind": stored.record.kind,
        "law": stored.record.describe(),
        "half_life": stored.half_life,
        "decay": stored.decay_per_unit,
        "per": stored.unit,
    }


def _compare_with_live(stored: StoredCheckpoint, track: TrackNames, model: KeyPath | None) -> dict[str, dict[str, Any]]:
    """The DCP name of each average and its distance from the live tensor, in the order of the model."""
    if model is None:
        return {"averages": track.all, "distances": {}}
    index = stored.index
    live, averages = index.models[model], stored.average_names(model, track)
    comparable = [name for name, average in averages.items() if index.shape(average) == index.shape(live[name])]
    dcp_names = [dcp_name for name in comparable for dcp_name in (averages[name], live[name])]
    with progress("comparing", sum(map(index.nbytes, dcp_names))) as advance:
        tensors = stored.stream(dcp_names, on_bytes=advance)
        # Keyword arguments are evaluated from left to right: the average comes first in the stream.
        distances = {name: distance(other=next(tensors), reference=next(tensors)).norm for name in comparable}
    return {"averages": averages, "distances": distances}


def _print_header(summary: Mapping[str, Any], stored: StoredCheckpoint) -> None:
    notes = {
        (dotted_name(key_path), track): averages.describe_initial_weights(track)
        for key_path, averages in stored.averages.items()
        for track in averages.tracks
    }
    for label, text in _header_rows(summary, notes):
        stdout_console().print(f"[bold]{label:<12}[/]{escape(text)}", soft_wrap=True)


def _header_rows(summary: Mapping[str, Any], notes: Mapping[tuple[str, str], str]) -> Iterator[tuple[str, str]]:
    yield "checkpoint", summary["path"]
    if saved := summary["saved"]:
        ranks = saved["world_size"]
        yield "step", str(summary["step"])
        yield "saved by", f"{ranks} {'rank' if ranks == 1 else 'ranks'}, torch {saved['torch']}"
        for entry, layout in saved["layouts"].items():
            yield "layout", f"{entry}: {layout}"
    else:
        pieces = max((tensor["pieces"] for tensor in summary["tensors"].values()), default=0)
        yield "saved by", f"plain dcp.save (no manifest), tensors in at most {pieces} pieces each"
    for entry, averages in summary["averages"].items():
        for name, track in averages["tracks"].items():
            decay = track["decay"]
            unit = PLURALS[decay["per"]]
            half_life = (
                f"half-life {decay['half_life']:,.6g} {unit}" if decay["half_life"] is not None else decay["law"]
            )
            counts = f"{averages['steps']:,} steps, {averages['updates']:,} updates"
            counts += f", time {averages['time']:,.12g}" if averages["time"] != averages["steps"] else ""
            is_known = decay["kind"] != UNRECORDED
            decay_per_unit = f" (decay {decay['decay']:.9g} per {decay['per']})" if is_known else ""
            yield "averages", f"{_entry_label(entry)}, track {name}: {half_life}{decay_per_unit}, {counts}"
            if note := notes[entry, name]:
                yield "note", note


def _print_entries(summary: Mapping[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("entry")
    table.add_column("kind")
    for header in ("tensors", "pieces", "size"):
        table.add_column(header, justify="right")
    table.add_column("dtypes")
    for name, entry in summary["entries"].items():
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in entry["dtypes"].items())
        table.add_row(
            escape(_entry_label(name)),
            entry["kind"],
            str(entry["tensors"]),
            str(entry["pieces"]),
            format_bytes(entry["bytes"]),
            dtypes,
        )
    total = sum(tensor["bytes"] for tensor in summary["tensors"].values())
    table.add_section()
    pieces = sum(tensor["pieces"] for tensor in summary["tensors"].values())
    table.add_row("total", "", str(len(summary["tensors"])), str(pieces), format_bytes(total), "")
    print_table(table)


def _print_tensors(
    title: str,
    index: CheckpointIndex,
    live: Mapping[str, str],  # names in the model to DCP names, as in `averages`
    *,
    averages: Mapping[str, str],
    distances: Mapping[str, float],
) -> None:
    """Prints one row for each tensor of a model and of its averages; either may be empty."""
    stdout_console().print(f"[bold italic]{escape(title)}[/]", soft_wrap=True)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("tensor")
    table.add_column("shape", justify="right")
    table.add_column("dtype")
    table.add_column("size", justify="right")
    if averages:
        table.add_column("average")
    if distances:
        table.add_column("distance", justify="right")
        table.add_column("", width=BAR_COLUMNS)
    largest = max((value for value in distances.values() if math.isfinite(value)), default=0.0)
    for name in {**live, **averages}:
        dcp_name = live.get(name) or averages[name]
        row = [
            escape(name),
            " x ".join(map(str, index.shape(dcp_name))) or "scalar",
            _dtype_name(index, live[name]) if name in live else "",
            format_bytes(index.nbytes(dcp_name)),
        ]
        if averages:
            row.append(_dtype_name(index, averages[name]) if name in averages else "[dim]none[/]")
        if distances:
            value = distances.get(name)
            row += ["", ""] if value is None else [f"{value:.3g}", _bar(value, largest)]
        table.add_row(*row)
    print_table(table)


def _bar(value: float, largest: float) -> str:
    if not math.isfinite(value):
        return "[red]" + "!" * BAR_COLUMNS
    return "[cyan]" + "━" * (math.ceil(BAR_COLUMNS * value / largest) if largest else 0)


def _entry_label(entry: str) -> str:
    return entry or "(the checkpoint itself)"


def _dtype_name(index: CheckpointIndex, name: str) -> str:
    return str(index.dtype(name)).removeprefix("torch.")
