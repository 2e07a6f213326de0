"""Full tensors: from everyone's shards to rank 0, from rank 0 back into the shards, and into another model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.shards import Layout, Shard


@torch.no_grad()
def gather(
    layout: Layout, averages: Mapping[str, Tensor], *, dtype: torch.dtype | None, keep: bool
) -> Iterator[tuple[str, Any]]:
    """Everything the unwrapped model's ``state_dict()`` holds, one full CPU tensor at a time.

    Args:
        averages: this rank's averaged parts and buffers by name; what has no average is taken from the live model.
        dtype: of floating tensors; None for each live one's own.
        keep: whether this rank gets the tensors; otherwise it gets None for each, and only helps.

    Collective: over the layout's ranks, all of which must exhaust it. Memory: one tensor beyond those handed out.
    """
    for shard, local in _averaged(layout, averages):
        full = shard.full(local)
        value = _on_cpu(full, local, dtype or shard.owner.dtype) if keep else None
        del full
        for name in shard.names:
            yield name, value
    for name, module in layout.extra_states.items():
        yield name, module.get_extra_state() if keep else None


def unite(entries: Iterator[tuple[str, Any]], group: ProcessGroup, device: torch.device) -> Iterator[tuple[str, Any]]:
    """The entries of all pipeline stages on the first rank of ``group``, one after the other; nothing elsewhere.

    Args:
        entries: of this rank's stage; they are exhausted on every rank.
        device: through which ``group`` sends.

    Collective: over ``group``. Memory: one full tensor beyond those handed out.
    """
    first, *others = dist.get_process_group_ranks(group)
    if dist.get_rank() == first:
        yield from entries
        for source in others:
            yield from _received(source, group, device)
        return
    for name, value in entries:
        if value is None:
            continue
        tensor = value if isinstance(value, Tensor) else None
        header = (name, value) if tensor is None else (name, tensor.to("meta"))
        dist.send_object_list([header], dst=first, group=group)
        if tensor is not None:
            dist.send(tensor.to(device), dst=first, group=group)
    dist.send_object_list([None], dst=first, group=group)


def _received(source: int, group: ProcessGroup, device: torch.device) -> Iterator[tuple[str, Any]]:
    while True:
        header: list[Any] = [None]
        dist.recv_object_list(header, src=source, group=group)
        if header[0] is None:
            return
        name, value = header[0]
        if isinstance(value, Tensor):
            arriving = torch.empty_like(value, device=device)
            dist.recv(arriving, src=source, group=group)
            value = arriving.to("cpu")
        yield name, value


@torch.no_grad()
def scatter(layout: Layout, averages: Mapping[str, Tensor], full: Mapping[str, Any]) -> None:
    """The reverse: every average becomes this rank's part of the full tensor that the first rank holds.

    Collective: over the layout's ranks. Memory: one full tensor on each rank.
    Raises: ValueError on every rank, before anything changes, when names or shapes are not the model's.
    """
    group, ranks = layout.group, layout.ranks
    is_source = group is None or dist.get_rank() == ranks[0]
    shards = {shard.name: shard for shard, _ in _averaged(layout, averages) if shard.name in averages}
    values = {
        first: full[name] for first, shard in shards.items() for name in shard.names[::-1] if is_source and name in full
    }
    told: list[Any] = [(_mismatch(layout, shards, full, values), _dtypes(values))] if is_source else [None]
    if group is not None:
        dist.broadcast_object_list(told, src=ranks[0], group=group)
    mismatch, dtypes = told[0]
    if mismatch:
        raise ValueError(f"these full tensors belong to another model: {mismatch}")
    for name, shard in shards.items():
        if is_source:
            value = values[name].to(shard.device).contiguous()
        else:
            value = torch.empty(shard.shape, dtype=dtypes[name], device=shard.device)
        if group is not None:
            dist.broadcast(value, src=ranks[0], group=group)
        averages[name].copy_(shard.cut(value))


@torch.no_grad()
def copy_into(target: Layout, layout: Layout, averages: Mapping[str, Tensor]) -> None:
    """Everything that `gather` would hand out, written into the live model of another layout.

    Collective: over the layout's ranks, except where both models are cut alike. Memory: one full tensor on each rank.
    Raises: ValueError when names or shapes differ, before anything changes.
    """
    theirs, ours = target.by_any_name(), layout.by_any_name()
    if names := (theirs | target.extra_states).keys() ^ (ours | layout.extra_states).keys():
        raise ValueError(f"the models differ in {sorted(names)}")
    if wrong := [name for name, shard in ours.items() if theirs[name].shape != shard.shape]:
        raise ValueError(f"the models differ in the shapes of {wrong}")
    for shard, local in _averaged(layout, averages):
        # Several, where the other model's are not tied.
        goals = list({id(theirs[name]): theirs[name] for name in shard.names}.values())
        full = local if all(goal.same_cut(shard) for goal in goals) else shard.full(local)
        for goal in goals:
            if goal.local is not local:
                goal.local.copy_(local if goal.same_cut(shard) else goal.cut(full))
    for name, module in layout.extra_states.items():
        if target.extra_states[name] is not module:
            target.extra_states[name].set_extra_state(module.get_extra_state())


def _averaged(layout: Layout, averages: Mapping[str, Tensor]) -> Iterator[tuple[Shard, Tensor]]:
    """The part that is averaged and its average, or the live shard and its tensor where there is none."""
    for shard in layout.shards:
        average = averages.get(shard.name)
        yield (shard, shard.local) if average is None else (shard.part, average)


def _on_cpu(full: Tensor, local: Tensor, dtype: torch.dtype) -> Tensor:
    """``full`` as a contiguous CPU tensor of its own."""
    wanted = dtype if full.is_floating_point() else full.dtype
    shares_storage = full.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
    return full.to("cpu", wanted, copy=shares_storage).contiguous()


def _mismatch(
    layout: Layout, shards: Mapping[str, Shard], full: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    """What keeps ``full`` from being taken over; empty when nothing does."""
    shapes = {name: getattr(value, "shape", type(value).__name__) for name, value in values.items()}
    found = {
        "unknown names": sorted(full.keys() - layout.by_any_name().keys() - layout.extra_states.keys()),
        "missing names": sorted(shards.keys() - values.keys()),
        "tied names with different values": sorted(
            name
            for first, shard in shards.items()
            for name in shard.names
            if name in full and full[name] is not values[first] and not _equal(full[name], values[first])
        ),
        "not tensors": sorted(name for name, value in values.items() if not isinstance(value, Tensor)),
        "shapes (expected, got)": {
            name: (tuple(shards[name].shape), shape) for name, shape in shapes.items() if shape != shards[name].shape
        },
    }
    return {what: where for what, where in found.items() if where}


def _equal(left: object, right: object) -> bool:
    return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left.cpu(), right.cpu())


def _dtypes(values: Mapping[str, Any]) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in values.items() if isinstance(value, Tensor)}
