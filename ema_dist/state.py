"""The state that checkpoints hold: its layout is fixed, and everything in it is checked before it is taken over.

``{"format": 1, "steps": int, "updates": int, "tracks": {"default": {"decay": {...}, "averages": {name: tensor},
"buffers": {name: tensor}}}}``, names being first canonical ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ema_dist.averages import Averages
from ema_dist.clock import Clock
from ema_dist.shards import Layout, Shard

FORMAT = 1
TRACK = "default"


def write_state(clock: Clock, layout: Layout, averages: Averages, current: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state, whose tensors share storage with ``current``: the averages by name, wherever they are now."""
    track = {
        "decay": clock.decay.state(),
        "averages": {name: layout.parameters[name].part.wrap(current[name]) for name in averages.parameters},
        "buffers": {name: layout.buffers[name].wrap(current[name]) for name in averages.buffers},
    }
    return {"format": FORMAT, "steps": clock.steps, "updates": clock.updates, "tracks": {TRACK: track}}


@torch.no_grad()
def read_state(state: Mapping[str, Any], clock: Clock, layout: Layout, averages: Averages) -> None:
    """Take over a state; a decay other than the clock's is a warning.

    Raises: ValueError when its format, names or shapes are not these, before anything changes.
    """
    tracks = state.get("tracks", {})
    if state.get("format") != FORMAT or TRACK not in tracks:
        raise ValueError(
            f"expected a state of ShardedEMA with format {FORMAT} and track {TRACK!r}, "
            f"got format {state.get('format')!r} and tracks {sorted(tracks)}"
        )
    track = tracks[TRACK]
    parts = {name: layout.parameters[name].part for name in averages.parameters}
    _check("averages", parts, track["averages"])
    _check("buffers", layout.buffers, track["buffers"])
    if track["decay"] != clock.decay.state():
        warnings.warn(
            f"the averages were taken with {track['decay']} and go on with {clock.decay.state()}",
            stacklevel=3,
        )
    for name, average in averages.parameters.items():
        average.copy_(parts[name].unwrap(track["averages"][name]))
    for name, average in averages.buffers.items():
        average.copy_(layout.buffers[name].unwrap(track["buffers"][name]))
    clock.set(steps=int(state["steps"]), updates=int(state["updates"]))
    averages.note_infinities()
    averages.bind(layout)


def _check(kind: str, shards: Mapping[str, Shard], saved: Mapping[str, Tensor]) -> None:
    if differing := shards.keys() ^ saved.keys():
        raise ValueError(f"these {kind} belong to another model: it and the state differ in {sorted(differing)}")
    wrong: dict[str, str] = {}
    for name, shard in shards.items():
        try:
            shard.unwrap(saved[name])
        except ValueError as error:  # noqa: PERF203  all that is wrong is named at once
            wrong[name] = str(error)
    if wrong:
        raise ValueError(
            f"these {kind} are cut or shaped differently: {wrong}; load the state through torch.distributed.checkpoint"
        )
