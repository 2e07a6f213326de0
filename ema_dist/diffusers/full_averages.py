"""Full averages, by name or in the order of ``model.parameters()``: gathered, loaded and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ema_dist.averages.full_weights import copy_one, gather
from ema_dist.communication.rendezvous import rendezvous
from ema_dist.diffusers.settings import DecaySettings
from ema_dist.ema import ShardedEMA
from ema_dist.messages import abbreviated
from ema_dist.sharding import Layout


def is_sharded(layout: Layout) -> bool:
    """Whether no rank holds the whole model."""
    return any(shard.gather_ranks for shard in layout.shards)


def gather_averages(
    ema: ShardedEMA | None, layout: Layout, call: str, *, timeout: float, is_destination: bool
) -> dict[str, Any]:
    """The full averaged model by name, in a dtype that holds the averages exactly; the live one if ``ema`` is None.

    Args:
        layout: of the live model.
        call: the method that the user called, for messages.
        is_destination: whether this rank gets the tensors; on other ranks the values are None.

    Collective: over the ranks that hold a sharded model.
    Raises: RuntimeError when they do not arrive within ``timeout`` seconds.
    """
    if is_sharded(layout):
        rendezvous(f"EMAModel.{call}", layout.ranks, timeout=timeout)
    averages: dict[str, Tensor] = {}
    if ema is not None:
        stored = ema.state_dict()["tracks"]["default"]["averages"]
        averages = {name: layout.parameters[name].unwrap(value) for name, value in stored.items()}
    dtypes = {average.dtype for average in averages.values()}
    is_rounded = any(average.dtype != layout.parameters[name].owner.dtype for name, average in averages.items())
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return dict(gather(layout, averages, dtype=wide if is_rounded else None, is_destination=is_destination))


def load_averages(ema: ShardedEMA, full: list[Tensor] | None, settings: DecaySettings, optimization_step: int) -> None:
    """Load full averages and the number of steps into ``ema``.

    Args:
        ema: new, with the law of ``settings``.
        full: the averages in the order of the parameters, equal on all ranks; None for the live weights.

    Collective: over the ranks that hold a sharded model.
    """
    state = ema.state_dict(for_loading=True)
    averages = state["tracks"]["default"]["averages"]
    if full is not None:
        by_name = dict(zip(Layout(ema.model, "copy").parameters, full, strict=True))
        averages = {name: by_name[name] for name in averages}
    decay = settings.decay_entry(optimization_step)
    track = {**state["tracks"]["default"], "averages": averages, "decay": decay}
    updates = max(0, optimization_step - settings.update_after_step)
    ema.load_state_dict({**state, "steps": optimization_step, "updates": updates, "tracks": {"default": track}})


@torch.no_grad()
def write(layout: Layout, values: Mapping[str, Tensor]) -> None:
    """Write this rank's values of parameters and buffers into the model."""
    layout.wait_for_device()
    for shard in layout.shards:
        if shard.name in values:
            copy_one(shard.local, values[shard.name])
            shard.increment_other_versions()


def shapes_of(model: nn.Module) -> list[torch.Size]:
    """The shapes of full parameters, in order."""
    return [parameter.shape for parameter in model.parameters()]


def require_shapes(tensors: list[Any], shapes: list[torch.Size], what: str) -> None:
    """Raise ValueError unless there is one tensor for each shape."""
    if len(tensors) != len(shapes):
        raise ValueError(f"{what}: expected {len(shapes)} tensors, got {len(tensors)}")
    if different := [
        f"number {index} ({tuple(shape)}, {tuple(tensor.shape)})"
        for index, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True))
        if tensor.shape != shape
    ]:
        raise ValueError(f"{what}: shapes differ (expected, got): {abbreviated(different)}")
