"""The whole state in one dictionary of full tensors on the first rank, for files that one rank writes and reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ema_dist.averages.first_rank import FirstRankBroadcast
from ema_dist.averages.full_weights import copy_one, to_cpu
from ema_dist.averages.state import make_state
from ema_dist.averages.tracks import Tracks
from ema_dist.schedules.clock import Clock
from ema_dist.sharding import Layout, Shard, is_sharded, subclass_name


@torch.no_grad()
def gather_state(
    clock: Clock,
    layout: Layout,
    tracks: Tracks,
    averages: Mapping[str, Mapping[str, Tensor]],
    *,
    is_destination: bool,
) -> dict[str, Any]:
    """The state with full averages on the CPU, in the dtype of ``averages``; empty unless this rank ``is_destination``.

    Args:
        averages: this rank's averages, by track and name.

    Collective: over the layout's ranks. Memory: the result, and one full tensor.
    """

    def gather(shard: Shard, track: str, name: str) -> Tensor | None:
        local = averages[track][name]
        full = shard.full(local, copy_one)
        return to_cpu(full, local, local.dtype) if is_destination else None

    state = make_state(clock, layout, tracks, convert=gather)
    return state if is_destination else {}


@torch.no_grad()
def scatter_state(layout: Layout, state: object) -> dict[str, Any]:
    """The first rank's state, with each full tensor replaced by this rank's part of it, for `load_state`.

    Collective: over the layout's ranks. Memory: the result, and one full tensor.
    Raises: RuntimeError on every rank when the first rank's state cannot be read.
    """
    first_rank = FirstRankBroadcast(layout)
    shards = {shard.name: shard.averaged_part for shard in layout.shards}
    specs = first_rank.broadcast_result(lambda: _map_tensors(state, _spec))

    def scatter(path: tuple[str, ...], spec: Tensor) -> Tensor:
        shard = shards.get(path[-1])
        if shard is None or spec.shape != shard.shape:
            return spec  # `load_state` reports all mismatches together
        full = first_rank.broadcast_tensor(lambda: _value_at(state, path), spec, shard.communication_device)
        return shard.wrap(shard.slice_full(full).clone())

    return _map_tensors(specs, scatter)


def _spec(path: tuple[str, ...], tensor: Tensor) -> Tensor:
    if is_sharded(tensor) or subclass_name(tensor):
        raise ValueError(
            f"expected full plain tensors, got a {type(tensor).__name__} for {path[-1]!r}: pass the state that "
            "consolidated_state_dict() returned on the first rank"
        )
    return tensor.to("meta")


def _map_tensors(
    value: object, function: Callable[[tuple[str, ...], Tensor], Tensor], path: tuple[str, ...] = ()
) -> Any:  # noqa: ANN401
    """A copy of ``value`` in which ``function(path, tensor)`` replaces each tensor."""
    if isinstance(value, Mapping):
        return {key: _map_tensors(item, function, (*path, key)) for key, item in value.items()}
    return function(path, value) if isinstance(value, Tensor) else value


def _value_at(state: Any, path: tuple[str, ...]) -> Any:  # noqa: ANN401
    for key in path:
        state = state[key]
    return state
