"""The state that checkpoints hold: its format is fixed, and all of it is checked before any of it is loaded.

``{"format": 1, "steps": int, "updates": int, "tracks": {track: {"decay": {...}, "averages": {name: tensor},
"buffers": {name: tensor}}}}``; the names of tensors are first canonical names.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ema_dist.averages.track import Track
from ema_dist.averages.tracks import Tracks
from ema_dist.messages import abbreviated, describe_difference
from ema_dist.schedules.clock import Clock
from ema_dist.sharding import Layout, Shard

STATE_FORMAT = 1


def make_state(
    clock: Clock, layout: Layout, tracks: Tracks, current: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """The state to save; its tensors share storage with ``current``.

    Args:
        current: the averages by track and name, as local tensors.
    """
    track_states = {
        track: {
            "decay": clock.decays[track].state(),
            "averages": {
                name: layout.parameters[name].averaged_part.wrap(current[track][name]) for name in averages.parameters
            },
            "buffers": {name: layout.buffers[name].wrap(current[track][name]) for name in averages.buffers},
        }
        for track, averages in tracks.items()
    }
    return {"format": STATE_FORMAT, "steps": clock.steps, "updates": clock.updates, "tracks": track_states}


@torch.no_grad()
def load_state(state: Mapping[str, Any], clock: Clock, layout: Layout, tracks: Tracks) -> None:
    """Load a state; warns if a decay differs from the clock's, which stays.

    Raises: ValueError when its format, tracks, names or shapes differ, before anything changes.
    """
    try:
        version, steps, updates = state["format"], int(state["steps"]), int(state["updates"])
        saved = {name: (entry["decay"], entry["averages"], entry["buffers"]) for name, entry in state["tracks"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"expected a state of ShardedEMA, a part of it is missing: {error}") from None
    if version != STATE_FORMAT:
        raise ValueError(f"expected a state of ShardedEMA with format {STATE_FORMAT}, got format {version!r}")
    if saved.keys() != tracks.keys():
        raise ValueError(f"expected a state with the tracks {[*tracks]}, got one with {[*saved]}")
    loaded: list[tuple[Track, dict[str, Tensor]]] = []
    for track, (_, averages, buffers) in saved.items():
        parts = {name: layout.parameters[name].averaged_part for name in tracks[track].parameters}
        values = _local_tensors("averages", parts, averages) | _local_tensors("buffers", layout.buffers, buffers)
        loaded.append((tracks[track], values))
    current_decays = {track: clock.decays[track].state() for track in tracks}
    if changed := [
        f"the averages {track!r} were taken with {decay} and go on with {current_decays[track]}"
        for track, (decay, *_) in saved.items()
        if decay != current_decays[track]
    ]:
        warnings.warn("; ".join(changed), stacklevel=4)
    for target, values in loaded:
        for name, value in values.items():
            target.write(name, value)
    clock.set(steps=steps, updates=updates)
    tracks.bind_loaded(layout)


def _local_tensors(kind: str, shards: Mapping[str, Shard], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's local tensors of ``saved``."""
    if different := describe_difference("the model", shards.keys(), "the state", saved.keys()):
        raise ValueError(f"these {kind} belong to another model: {different}")
    values: dict[str, Tensor] = {}
    mismatches: list[str] = []
    for name, shard in shards.items():
        try:
            values[name] = shard.unwrap(saved[name])
        except ValueError as error:  # noqa: PERF203  one message names all mismatches
            mismatches.append(f"{name} ({error})")
    if mismatches:
        raise ValueError(
            f"these {kind} are cut or shaped differently: {abbreviated(mismatches)}; load the state through "
            "torch.distributed.checkpoint"
        )
    return values
