"""The state stored in checkpoints: its format is fixed, and all of it is checked before any of it is loaded.

``{"format": 1, "steps": int, "updates": int, "tracks": {track: {"decay": {"kind": str, "value": str}, "averages":
{name: tensor}, "buffers": {name: tensor}}}}``. The names of tensors are first canonical names, and
`ema_dist.schedules.decay` describes the value of a decay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor

from ema_dist.averages.full_weights import dtype_kind
from ema_dist.averages.track import Track
from ema_dist.averages.tracks import Tracks
from ema_dist.kernels import copy_to_host
from ema_dist.messages import abbreviated, describe_difference, warn_caller
from ema_dist.schedules.clock import Clock
from ema_dist.schedules.decay import UNRECORDED, DecayRecord, describe_changed_laws, read_clock, record_decays
from ema_dist.sharding import Layout, Shard, cpu_copy

STATE_FORMAT = 1


class ShardedState(dict[str, Any]):
    """A state with this rank's parts of tensors, which only `torch.distributed.checkpoint` (DCP) can save.

    Pickling raises TypeError: the file would hold the parts of one rank, and other ranks would load them as theirs.
    A deep copy has plain dictionaries and CPU tensors: DCP's ``DefaultStager`` deep-copies each object whose type it
    does not know, does not move tensors in it to the CPU, and may pickle the copy for a process that writes it.
    """

    def __copy__(self) -> ShardedState:
        return ShardedState(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        for value in self.values():
            if isinstance(value, Tensor) and id(value) not in memo:
                # deepcopy() uses this CPU copy, and makes no copy on the device.
                memo[id(value)] = cpu_copy(value, copy_to_host)
        return {key: deepcopy(value, memo) for key, value in self.items()}

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "ShardedEMA.state_dict() holds only this rank's part of the averages, so torch.save and pickle would lose "
            "the others: save ShardedEMA.consolidated_state_dict() instead, or use ema_dist.checkpoint.save or "
            "torch.distributed.checkpoint. With accelerate, replace register_for_checkpointing(ema) by "
            "ema_dist.accelerate.register(accelerator, ema)"
        )


def make_state(
    clock: Clock,
    layout: Layout,
    tracks: Tracks,
    *,
    convert: Callable[[Shard, str, str], Any],
    make_dict: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """The state to save.

    Args:
        convert: takes the averaged part of a tensor, the name of its track and its own name, and returns the value to
            save; called in the same order on every rank.
        make_dict: makes the dictionary of each level.
    """
    track_states: dict[str, Any] = {}
    decays = record_decays(clock)
    for track, averages in tracks.items():
        parameters = {name: convert(layout.parameters[name].averaged_part, track, name) for name in averages.parameters}
        buffers = {name: convert(layout.buffers[name], track, name) for name in averages.buffers}
        track_states[track] = make_dict(
            {
                "decay": decays[track].state(),
                "averages": make_dict(parameters),
                "buffers": make_dict(buffers),
            }
        )
    return make_dict(
        {"format": STATE_FORMAT, "steps": clock.steps, "updates": clock.updates, "tracks": make_dict(track_states)}
    )


@torch.no_grad()
def load_state(
    state: Mapping[str, Any], clock: Clock, layout: Layout, tracks: Tracks, *, empty_hint: str, warns: bool
) -> None:
    """Load a state; the laws of ``clock`` are kept.

    Args:
        empty_hint: appended to the error for an empty state.
        warns: whether to warn about laws that differ.

    Raises: ValueError when the format, tracks, names or shapes differ, before anything changes.
    """
    if not state:
        raise ValueError(f"expected a state of ShardedEMA, got an empty one: {empty_hint}")
    try:
        version, steps, updates = state["format"], int(state["steps"]), int(state["updates"])
        saved = {name: (entry["averages"], entry["buffers"]) for name, entry in state["tracks"].items()}
        decays = {name: (entry["decay"]["kind"], entry["decay"]["value"]) for name, entry in state["tracks"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"expected a state of ShardedEMA, but a part of it is missing or invalid: {error}") from None
    if version != STATE_FORMAT:
        raise ValueError(f"expected a state of ShardedEMA with format {STATE_FORMAT}, got format {version!r}")
    if saved.keys() != tracks.keys():
        raise ValueError(f"expected a state with the tracks {[*tracks]}, got one with {[*saved]}")
    records = {track: DecayRecord.parse(kind, value) for track, (kind, value) in decays.items()}
    clock_state = read_clock(records, steps=steps, updates=updates, start=clock.start)
    loaded: list[tuple[Track, dict[str, Tensor]]] = []
    for track, (averages, buffers) in saved.items():
        parts = {name: layout.parameters[name].averaged_part for name in tracks[track].parameters}
        values = _local_tensors("averages", parts, averages) | _local_tensors("buffers", layout.buffers, buffers)
        loaded.append((tracks[track], values))
    if warns and (changed := describe_changed_laws(records, clock.schedules)):
        warnings.warn(
            "this state was saved with a different schedule; training continues with the one given to ShardedEMA: "
            f"{changed}",
            stacklevel=6,
        )
    for target, values in loaded:
        for name, value in values.items():
            target.write(name, value)
    clock.restore(clock_state)
    tracks.bind_loaded(layout)
    if warns and any(record.kind == UNRECORDED for record in records.values()):
        _warn_if_replaced_soon(clock)


def _warn_if_replaced_soon(clock: Clock) -> None:
    """Warn when the next update gives the live weights more weight than the imported averages."""
    for track, weight in clock.next_weights().items():
        if weight > 0.5 and clock.initial_mass(track) < 1:
            warn_caller(
                f"the next update replaces {weight:.0%} of the imported averages by the live weights, because their "
                f"number of steps, {clock.steps}, is low for {clock.schedules[track]!r} with start={clock.start}. If "
                "the averages cover more steps, pass how many (steps=N of import_averages, --steps N of ema-dist "
                "import); else use a law that does not depend on the step, such as HalfLife, without start="
            )


def _local_tensors(kind: str, shards: Mapping[str, Shard], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's local tensors of ``saved``."""
    if different := describe_difference("the model", shards.keys(), "the state", saved.keys()):
        raise ValueError(f"these {kind} do not match this model: {different}")
    values: dict[str, Tensor] = {}
    mismatches: list[str] = []
    for name, shard in shards.items():
        try:
            values[name] = shard.unwrap(saved[name])
            kinds = dtype_kind(shard.owner.dtype), dtype_kind(values[name].dtype)
            if kinds[0] != kinds[1]:
                raise ValueError(f"expected {kinds[0]}, got {kinds[1]}")  # noqa: TRY301  reported with the others
        except ValueError as error:  # noqa: PERF203  one message names all mismatches
            mismatches.append(f"{name} ({error})")
    if mismatches:
        raise ValueError(
            f"these {kind} differ from the model in shape, kind of dtype or sharding: {abbreviated(mismatches)}. To "
            "change the sharding, load through torch.distributed.checkpoint, or load a consolidated_state_dict()"
        )
    return values
