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

from ema_dist.averages.storage import Averages
from ema_dist.communication.rendezvous import rendezvous
from ema_dist.messages import abbreviated, describe_difference
from ema_dist.sharding import Layout, Shard

T = TypeVar("T")


@torch.no_grad()
def gather(
    layout: Layout, averages: Mapping[str, Tensor], *, dtype: torch.dtype | None, is_destination: bool
) -> Iterator[tuple[str, Any]]:
    """Everything the unwrapped model's ``state_dict()`` holds, one full CPU tensor at a time.

    Args:
        averages: this rank's averaged parts and buffers by name; what has no average is taken from the live model.
        dtype: of floating tensors; None for each live one's own.
        keep: whether this rank gets the tensors; otherwise it gets None for each, and only helps.

    Collective: over the layout's ranks, all of which must exhaust it. Memory: one tensor beyond those handed out.
    """
    for shard, local in _shards_and_values(layout, averages):
        full = shard.full(local)
        value = _to_cpu(full, local, dtype or shard.owner.dtype) if is_destination else None
        del full
        for name in shard.names:
            yield name, value
    for name, module in layout.extra_states.items():
        yield name, module.get_extra_state() if is_destination else None


def full_shapes(layout: Layout, *, dtype: torch.dtype | None) -> dict[str, Tensor | None]:
    """The entries that `gather` would hand out, on the meta device; None for extra states that are not tensors."""
    shapes: dict[str, Tensor | None] = {}
    for shard in layout.shards:
        target_dtype = dtype if dtype and shard.owner.is_floating_point() else shard.owner.dtype
        for name in shard.names:
            shapes[name] = torch.empty(shard.shape, dtype=target_dtype, device="meta")
    for name, module in layout.extra_states.items():
        state = module.get_extra_state()
        shapes[name] = state.to("meta") if isinstance(state, Tensor) else None
    return shapes


def gather_pipeline(
    entries: Iterator[tuple[str, Any]], layout: Layout, pipeline: ProcessGroup, *, timeout: float
) -> Iterator[tuple[str, Any]]:
    """The entries of all pipeline stages on the first rank of ``pipeline``, stage by stage; nothing elsewhere.

    Args:
        entries: those of this rank's stage; every rank exhausts its own.
        layout: this rank's stage.
        timeout: seconds that the stages wait for each other.

    Collective: over ``pipeline``. Memory: one full tensor beyond those handed out.
    Raises: ValueError when two ranks of ``pipeline`` hold the same stage; RuntimeError when ranks do not come.
    """
    ranks = dist.get_process_group_ranks(pipeline)
    if len({*ranks} & {*layout.ranks}) > 1:
        raise ValueError(f"pipeline={ranks} should hold one rank of each stage, but one is held by {layout.ranks}")
    rendezvous("full_state_dict(pipeline=...)", ranks, timeout=timeout)
    return _gather_stages(entries, pipeline, layout.shards[0].device)


def _gather_stages(
    entries: Iterator[tuple[str, Any]], group: ProcessGroup, device: torch.device
) -> Iterator[tuple[str, Any]]:
    first, *others = dist.get_process_group_ranks(group)
    if dist.get_rank() == first:
        yield from entries
        for source in others:
            yield from _receive(source, group, device)
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


def collect(entries: Iterator[tuple[str, Any]], *, is_destination: bool) -> dict[str, Any]:
    """All entries in one dictionary; those without a value only where this rank gets the tensors.

    Raises: ValueError when pipeline stages hold different tensors under one name.
    """
    full: dict[str, Any] = {}
    different: list[str] = []
    for name, value in entries:
        if value is None and not is_destination:
            continue
        if isinstance(value, Tensor) and name in full and not torch.equal(full[name], value):
            different.append(name)
        full.setdefault(name, value)
    if different:
        raise ValueError(f"pipeline stages hold different tensors under the names {abbreviated(different)}")
    return full


def _receive(source: int, group: ProcessGroup, device: torch.device) -> Iterator[tuple[str, Any]]:
    while True:
        header: list[Any] = [None]
        dist.recv_object_list(header, src=source, group=group)
        if header[0] is None:
            return
        name, value = header[0]
        if isinstance(value, Tensor):
            buffer = torch.empty_like(value, device=device)
            dist.recv(buffer, src=source, group=group)
            value = buffer.to("cpu")
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
    stored = averages.tensors
    shards = {shard.name: shard.averaged_part for shard in layout.shards if shard.name in stored}
    first_rank = _FirstRank(layout)
    mismatch, specs = first_rank.broadcast_result(lambda: _find_mismatches(layout, shards, full))
    if mismatch:
        raise ValueError(f"these full tensors belong to another model: {mismatch}")
    for name, (source, spec) in specs.items():
        shard = shards[name]
        averages.write(
            name, shard.slice_full(first_rank.broadcast_tensor(partial(getitem, full, source), spec, shard.device))
        )


@torch.no_grad()
def copy_into(target: Layout, layout: Layout, averages: Mapping[str, Tensor]) -> None:
    """Everything that `gather` would hand out, written into the live model of another layout.

    Collective: over the layout's ranks, except where both models are cut alike. Memory: one full tensor on each rank.
    Raises: ValueError when names or shapes differ, before anything changes.
    """
    target_shards_by_name, shards_by_name = target.shards_by_name(), layout.shards_by_name()
    names, target_names = (
        (shards_by_name | layout.extra_states).keys(),
        (target_shards_by_name | target.extra_states).keys(),
    )
    if different := describe_difference("the averaged one", names, "the given one", target_names):
        raise ValueError(f"the models differ: {different}")
    if mismatched := [
        name for name, shard in shards_by_name.items() if target_shards_by_name[name].shape != shard.shape
    ]:
        raise ValueError(f"the models differ in the shapes of {abbreviated(mismatched)}")
    for shard, local in _shards_and_values(layout, averages):
        # Several, where the other model's are not tied.
        target_shards = list(
            {id(target_shards_by_name[name]): target_shards_by_name[name] for name in shard.names}.values()
        )
        full = (
            local if all(target_shard.is_sharded_like(shard) for target_shard in target_shards) else shard.full(local)
        )
        for target_shard in target_shards:
            if target_shard.local is not local:
                target_shard.local.copy_(
                    local if target_shard.is_sharded_like(shard) else target_shard.slice_full(full)
                )
    for name, module in layout.extra_states.items():
        if target.extra_states[name] is not module:
            target.extra_states[name].set_extra_state(module.get_extra_state())


def _shards_and_values(layout: Layout, averages: Mapping[str, Tensor]) -> Iterator[tuple[Shard, Tensor]]:
    """The part that is averaged and its average, or the live shard and its tensor where there is none."""
    for shard in layout.shards:
        average = averages.get(shard.name)
        yield (shard, shard.local) if average is None else (shard.averaged_part, average)


def _to_cpu(full: Tensor, local: Tensor, dtype: torch.dtype) -> Tensor:
    """``full`` as a contiguous CPU tensor of its own."""
    target_dtype = dtype if full.is_floating_point() else full.dtype
    shares_storage = full.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
    return full.to("cpu", target_dtype, copy=shares_storage).contiguous()


class _FirstRank:
    """The first rank speaks, and what goes wrong there is raised on all: they would wait for it forever."""

    def __init__(self, layout: Layout) -> None:
        self._group = layout.group
        self._source = layout.ranks[0] if layout.ranks else 0
        self._is_source = self._group is None or dist.get_rank() == self._source
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def broadcast_result(self, call: Callable[[], T], hint: str = "") -> T:
        """What ``call`` returns there, on every rank."""
        message: list[Any] = [None, ""]
        cause = None
        if self._is_source:
            try:
                message[0] = call()
            except Exception as error:  # noqa: BLE001
                cause = error
                message[1] = f"the full tensors cannot be read: {error!r}{hint}"
        if self._group is not None:
            dist.broadcast_object_list(message, src=self._source, group=self._group)
        result, problem = message
        if problem:
            raise RuntimeError(problem) from cause
        return result

    def broadcast_tensor(self, read: Callable[[], Tensor], spec: Tensor, device: torch.device) -> Tensor:
        """The full tensor that ``read`` returns there, on every rank; elsewhere in the place of the one before."""
        values: list[Tensor] = []
        self.broadcast_result(
            lambda: values.append(_require_spec(read(), spec).to(device).contiguous()),
            hint="; the averages are new in part only, so load them again",
        )
        value = values.pop() if values else self._receive_buffer(spec, device)
        if self._group is not None:
            dist.broadcast(value, src=self._source, group=self._group)
        return value

    def _receive_buffer(self, spec: Tensor, device: torch.device) -> Tensor:
        # One for all: threads of gloo hold what they have received for a moment longer.
        if self._buffer.nbytes < spec.nbytes or self._buffer.device != device:
            self._buffer = torch.empty(spec.nbytes, dtype=torch.uint8, device=device)
        return self._buffer[: spec.nbytes].view(spec.dtype).view(spec.shape)


def _find_mismatches(
    layout: Layout, shards: Mapping[str, Shard], full: Mapping[str, Any]
) -> tuple[str, dict[str, tuple[str, Any]]]:
    """What keeps ``full`` from being taken over, if anything; and which of its values is whose, and its outline."""
    names = {canonical_name: [name for name in shard.names if name in full] for canonical_name, shard in shards.items()}
    specs = {
        canonical_name: (present[0], _spec_of(full[present[0]])) for canonical_name, present in names.items() if present
    }
    mismatch = {
        "unknown names": full.keys() - layout.shards_by_name().keys() - layout.extra_states.keys(),
        "missing names": [canonical_name for canonical_name, present in names.items() if not present],
        "tied names with different values": [
            name
            for present in names.values()
            for name in present[1:]
            if not _is_identical(full[name], full[present[0]])
        ],
        "not tensors": [canonical_name for canonical_name, (_, spec) in specs.items() if not isinstance(spec, Tensor)],
        "shapes (expected, got)": [
            f"{canonical_name} ({tuple(shards[canonical_name].shape)}, {getattr(spec, 'shape', spec)})"
            for canonical_name, (_, spec) in specs.items()
            if getattr(spec, "shape", None) != shards[canonical_name].shape
        ],
        "kinds of dtype (expected, got)": [
            f"{canonical_name} ({_dtype_kind(shards[canonical_name].owner.dtype)}, {_dtype_kind(spec.dtype)})"
            for canonical_name, (_, spec) in specs.items()
            if isinstance(spec, Tensor) and _dtype_kind(spec.dtype) != _dtype_kind(shards[canonical_name].owner.dtype)
        ],
    }
    return "; ".join(f"{what}: {abbreviated(sorted(where))}" for what, where in mismatch.items() if where), specs


def _spec_of(value: object) -> Tensor | str:
    """Shape and dtype of a tensor, on the meta device; the type of anything else."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return type(value).__name__


def _dtype_kind(dtype: torch.dtype) -> str:
    """Casts between two of one kind round, at most; others drop what they cannot hold."""
    if dtype.is_floating_point or dtype.is_complex:
        return "floating" if dtype.is_floating_point else "complex"
    return "boolean" if dtype is torch.bool else "integer"


def _require_spec(value: Tensor, spec: Tensor) -> Tensor:
    if (value.shape, value.dtype) != (spec.shape, spec.dtype):
        got = f"{value.dtype} of {tuple(value.shape)}"
        raise ValueError(f"expected {spec.dtype} of {tuple(spec.shape)} as at first, found {got}")
    return value


def _is_identical(left: object, right: object) -> bool:
    """Whether two values are the same one, or tensors alike to the bit; NaN is like NaN there."""
    if left is right or not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return left is right
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    return torch.equal(*(tensor.cpu().contiguous().flatten().view(torch.uint8) for tensor in (left, right)))
