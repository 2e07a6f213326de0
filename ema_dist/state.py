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
    try:
        version, steps, updates = state["format"], int(state["steps"]), int(state["updates"])
        track = state["tracks"][TRACK]
        decay, saved_averages, saved_buffers = track["decay"], track["averages"], track["buffers"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a state of ShardedEMA with a track {TRACK!r}; its part is missing: {error}"
        ) from None
    if version != FORMAT:
        raise ValueError(f"expected a state of ShardedEMA with format {FORMAT}, got format {version!r}")
    parts = {name: layout.parameters[name].part for name in averages.parameters}
    pairs = _paired("averages", averages.parameters, parts, saved_averages)
    pairs += _paired("buffers", averages.buffers, layout.buffers, saved_buffers)
    if decay != clock.decay.state():
        warnings.warn(f"the averages were taken with {decay} and go on with {clock.decay.state()}", stacklevel=3)
    for average, value in pairs:
        if value.data_ptr() != average.data_ptr():  # DCP has read into the averages themselves
            average.copy_(value)
    clock.set(steps=steps, updates=updates)
    averages.note_infinities()
    averages.bind(layout)


def _paired(
    kind: str, averages: Mapping[str, Tensor], shards: Mapping[str, Shard], saved: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Each average and the local tensor to be copied there."""
    if differing := shards.keys() ^ saved.keys():
        raise ValueError(f"these {kind} belong to another model: it and the state differ in {sorted(differing)}")
    pairs: list[tuple[Tensor, Tensor]] = []
    wrong: dict[str, str] = {}
    for name, shard in shards.items():
        try:
            pairs.append((averages[name], shard.unwrap(saved[name])))
        except ValueError as error:  # noqa: PERF203  all that is wrong is named at once
            wrong[name] = str(error)
    if wrong:
        raise ValueError(
            f"these {kind} are cut or shaped differently: {wrong}; load the state through torch.distributed.checkpoint"
        )
    return pairs
