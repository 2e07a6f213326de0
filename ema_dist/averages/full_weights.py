"""Full tensors: from everyone's shards to rank 0, from rank 0 back into the shards, and into another model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import getitem
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.averages.tracks import Averages
from ema_dist.messages import apart, few
from ema_dist.sharding import Layout, Shard

T = TypeVar("T")


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


def full_shapes(layout: Layout, *, dtype: torch.dtype | None) -> dict[str, Tensor | None]:
    """The entries that `gather` would hand out, on the meta device; None for extra states that are not tensors."""
    shapes: dict[str, Tensor | None] = {}
    for shard in layout.shards:
        wanted = dtype if dtype and shard.owner.is_floating_point() else shard.owner.dtype
        for name in shard.names:
            shapes[name] = torch.empty(shard.shape, dtype=wanted, device="meta")
    for name, module in layout.extra_states.items():
        state = module.get_extra_state()
        shapes[name] = state.to("meta") if isinstance(state, Tensor) else None
    return shapes


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


def collect(entries: Iterator[tuple[str, Any]], *, keep: bool) -> dict[str, Any]:
    """All entries in one dictionary; those without a value only where this rank gets the tensors.

    Raises: ValueError when pipeline stages hold different tensors under one name.
    """
    full: dict[str, Any] = {}
    different: list[str] = []
    for name, value in entries:
        if value is None and not keep:
            continue
        if isinstance(value, Tensor) and name in full and not torch.equal(full[name], value):
            different.append(name)
        full.setdefault(name, value)
    if different:
        raise ValueError(f"pipeline stages hold different tensors under the names {few(different)}")
    return full


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
def scatter(layout: Layout, averages: Averages, full: Mapping[str, Any]) -> None:
    """The reverse: every average becomes this rank's part of the full tensor that the first rank holds.

    Args:
        full: looked at on the first rank, each value twice: it may read them when it is asked for them.

    Collective: over the layout's ranks. Memory: one full tensor on each rank; two while tied ones are compared.
    Raises: ValueError on every rank, before anything changes, when names, shapes or kinds of dtype are not the
        model's; RuntimeError on every rank when a value cannot be read.
    """
    kept = averages.all
    shards = {shard.name: shard.part for shard in layout.shards if shard.name in kept}
    first = _First(layout)
    mismatch, outlines = first.says(lambda: _compare(layout, shards, full))
    if mismatch:
        raise ValueError(f"these full tensors belong to another model: {mismatch}")
    for name, (source, outline) in outlines.items():
        shard = shards[name]
        averages.put(name, shard.cut(first.sends(partial(getitem, full, source), outline, shard.device)))


@torch.no_grad()
def copy_into(target: Layout, layout: Layout, averages: Mapping[str, Tensor]) -> None:
    """Everything that `gather` would hand out, written into the live model of another layout.

    Collective: over the layout's ranks, except where both models are cut alike. Memory: one full tensor on each rank.
    Raises: ValueError when names or shapes differ, before anything changes.
    """
    theirs, ours = target.by_any_name(), layout.by_any_name()
    names, their_names = (ours | layout.extra_states).keys(), (theirs | target.extra_states).keys()
    if different := apart("the averaged one", names, "the given one", their_names):
        raise ValueError(f"the models differ: {different}")
    if wrong := [name for name, shard in ours.items() if theirs[name].shape != shard.shape]:
        raise ValueError(f"the models differ in the shapes of {few(wrong)}")
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


class _First:
    """The first rank speaks, and what goes wrong there is raised on all: they would wait for it forever."""

    def __init__(self, layout: Layout) -> None:
        self._group = layout.group
        self._rank = layout.ranks[0] if layout.ranks else 0
        self._is_me = self._group is None or dist.get_rank() == self._rank
        self._room = torch.empty(0, dtype=torch.uint8)

    def says(self, call: Callable[[], T], hint: str = "") -> T:
        """What ``call`` returns there, on every rank."""
        told: list[Any] = [None, ""]
        cause = None
        if self._is_me:
            try:
                told[0] = call()
            except Exception as error:  # noqa: BLE001
                cause = error
                told[1] = f"the full tensors cannot be read: {error!r}{hint}"
        if self._group is not None:
            dist.broadcast_object_list(told, src=self._rank, group=self._group)
        result, problem = told
        if problem:
            raise RuntimeError(problem) from cause
        return result

    def sends(self, read: Callable[[], Tensor], outline: Tensor, device: torch.device) -> Tensor:
        """The full tensor that ``read`` returns there, on every rank; elsewhere in the place of the one before."""
        values: list[Tensor] = []
        self.says(
            lambda: values.append(_fitting(read(), outline).to(device).contiguous()),
            hint="; the averages are new in part only, so load them again",
        )
        value = values.pop() if values else self._room_for(outline, device)
        if self._group is not None:
            dist.broadcast(value, src=self._rank, group=self._group)
        return value

    def _room_for(self, outline: Tensor, device: torch.device) -> Tensor:
        # One for all: threads of gloo hold what they have received for a moment longer.
        if self._room.nbytes < outline.nbytes or self._room.device != device:
            self._room = torch.empty(outline.nbytes, dtype=torch.uint8, device=device)
        return self._room[: outline.nbytes].view(outline.dtype).view(outline.shape)


def _compare(
    layout: Layout, shards: Mapping[str, Shard], full: Mapping[str, Any]
) -> tuple[str, dict[str, tuple[str, Any]]]:
    """What keeps ``full`` from being taken over, if anything; and which of its values is whose, and its outline."""
    names = {first: [name for name in shard.names if name in full] for first, shard in shards.items()}
    outlines = {first: (found[0], _outline(full[found[0]])) for first, found in names.items() if found}
    mismatch = {
        "unknown names": full.keys() - layout.by_any_name().keys() - layout.extra_states.keys(),
        "missing names": [first for first, found in names.items() if not found],
        "tied names with different values": [
            name for found in names.values() for name in found[1:] if not _same(full[name], full[found[0]])
        ],
        "not tensors": [first for first, (_, outline) in outlines.items() if not isinstance(outline, Tensor)],
        "shapes (expected, got)": [
            f"{first} ({tuple(shards[first].shape)}, {getattr(outline, 'shape', outline)})"
            for first, (_, outline) in outlines.items()
            if getattr(outline, "shape", None) != shards[first].shape
        ],
        "kinds of dtype (expected, got)": [
            f"{first} ({_kind(shards[first].owner.dtype)}, {_kind(outline.dtype)})"
            for first, (_, outline) in outlines.items()
            if isinstance(outline, Tensor) and _kind(outline.dtype) != _kind(shards[first].owner.dtype)
        ],
    }
    return "; ".join(f"{what}: {few(sorted(where))}" for what, where in mismatch.items() if where), outlines


def _outline(value: object) -> Tensor | str:
    """Shape and dtype of a tensor, on the meta device; the type of anything else."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return type(value).__name__


def _kind(dtype: torch.dtype) -> str:
    """Casts between two of one kind round, at most; others drop what they cannot hold."""
    if dtype.is_floating_point or dtype.is_complex:
        return "floating" if dtype.is_floating_point else "complex"
    return "boolean" if dtype is torch.bool else "integer"


def _fitting(value: Tensor, outline: Tensor) -> Tensor:
    if (value.shape, value.dtype) != (outline.shape, outline.dtype):
        found = f"{value.dtype} of {tuple(value.shape)}"
        raise ValueError(f"expected {outline.dtype} of {tuple(outline.shape)} as at first, found {found}")
    return value


def _same(left: object, right: object) -> bool:
    """Whether two values are the same one, or tensors alike to the bit; NaN is like NaN there."""
    if left is right or not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return left is right
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    return torch.equal(*(it.cpu().contiguous().flatten().view(torch.uint8) for it in (left, right)))
