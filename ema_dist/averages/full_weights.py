"""Full tensors: gathered from the shards on rank 0, scattered from there into shards, and copied to another model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from operator import getitem
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.averages.first_rank import FirstRankBroadcast, SendingDevices, contiguous_on
from ema_dist.averages.track import Track
from ema_dist.communication.objects import receive_object, send_object
from ema_dist.communication.rendezvous import rendezvous
from ema_dist.kernels import copy_pairs, copy_to_host
from ema_dist.messages import abbreviated, describe_difference, describe_ranks
from ema_dist.sharding import (
    ExpandedShard,
    Layout,
    Shard,
    as_bytes,
    has_equal_bits,
    subclass_name,
)


@torch.no_grad()
def gather(
    layout: Layout, averages: Mapping[str, Tensor], *, dtype: torch.dtype | None, is_destination: bool
) -> Iterator[tuple[str, Any]]:
    """The entries of the unwrapped model's ``state_dict()``, one full CPU tensor at a time.

    Args:
        layout: the live model, which provides the values without an average.
        averages: this rank's averages of parameters and buffers, by name.
        dtype: of floating tensors; None for the dtype of each live tensor.
        is_destination: whether this rank gets the tensors; otherwise it gets None for each, and only sends its shards.

    Collective: over the layout's ranks, which must all exhaust the iterator.
    Memory: one full tensor beyond those yielded.
    Raises: ValueError for a sharded tensor subclass; errors in copying to the CPU, after all collectives.
    """
    failure: Exception | None = None
    for shard, local in _shards_and_values(layout, averages):
        _require_gatherable(shard, local)
        full = shard.full(local, copy_one)
        value = None
        if is_destination and not failure:
            try:
                value = to_cpu(full, local, dtype or shard.owner.dtype)
            except Exception as error:  # noqa: BLE001  the other ranks wait in the collectives of the next tensors
                failure = error
        else:
            _wait_for_sending(full)
        del full
        if not failure:
            for name in shard.names:
                yield name, value
    if failure:
        raise failure
    for name, module in layout.extra_states.items():
        yield name, module.get_extra_state() if is_destination else None


def _wait_for_sending(full: Tensor) -> None:
    """Wait for the device on ranks that only send: torch before 2.8 frees a sent tensor only after its collective."""
    if full.device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(full.device)


def _require_gatherable(shard: Shard, local: Tensor) -> None:
    if shard.gather_ranks and (subclass := subclass_name(local)):
        raise ValueError(
            f"{shard.name!r} is a {subclass} (a tensor subclass) sharded over ranks, which cannot be gathered: store "
            "it in full on every rank, or replace it with a plain tensor"
        )


def full_shapes(layout: Layout, *, dtype: torch.dtype | None) -> dict[str, Tensor | None]:
    """The entries of `gather` as tensors on the meta device; None for extra states that are not tensors.

    Collective: no. Raises: ValueError for a sharded tensor subclass.
    """
    shapes: dict[str, Tensor | None] = {}
    for shard in layout.shards:
        target_dtype = dtype if dtype and shard.owner.is_floating_point() else shard.owner.dtype
        shape = torch.empty(shard.shape, dtype=target_dtype, device="meta")
        _require_gatherable(shard, shard.local)
        for name in shard.names:
            shapes[name] = shard.local.to("meta") if subclass_name(shard.local) else shape
    for name, module in layout.extra_states.items():
        state = module.get_extra_state()
        shapes[name] = state.to("meta") if isinstance(state, Tensor) else None
    return shapes


def gather_pipeline(
    entries: Iterator[tuple[str, Any]], layout: Layout, pipeline: ProcessGroup, *, timeout: float
) -> Iterator[tuple[str, Any]]:
    """The entries of all pipeline stages on the first rank of ``pipeline``, stage by stage; nothing elsewhere.

    Args:
        entries: the entries of this rank's stage; every rank exhausts its own iterator.
        layout: this rank's stage.
        timeout: seconds that the stages wait for each other.

    Collective: over ``pipeline``. Memory: one full tensor beyond those yielded.
    Raises: ValueError when two ranks of ``pipeline`` hold the same stage; RuntimeError when ranks do not arrive.
    """
    ranks = dist.get_process_group_ranks(pipeline)
    if len({*ranks} & {*layout.ranks}) > 1:
        raise ValueError(
            f"pipeline must be a process group with one rank of each stage, but several of its {describe_ranks(ranks)} "
            f"hold the same stage, which is on {describe_ranks(layout.ranks)}"
        )
    rendezvous("full_state_dict(pipeline=...)", ranks, timeout=timeout)
    # gloo's send and recv access CPU memory only: they would take a device address for a CPU address.
    return _gather_stages(entries, pipeline, SendingDevices(pipeline, layout).for_host_values)


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
        send_object(header, destination=first, group=group, device=device)
        if tensor is not None:
            dist.send(as_bytes(contiguous_on(device, tensor)), dst=first, group=group)
    send_object(None, destination=first, group=group, device=device)


def collect(entries: Iterator[tuple[str, Any]], *, is_destination: bool) -> dict[str, Any]:
    """All entries in one dictionary; drops entries whose value is None unless this rank ``is_destination``.

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
        raise ValueError(
            f"pipeline stages hold different tensors under the same names: {abbreviated(different)}. Rename them, or "
            "gather each stage without pipeline="
        )
    return full


def _receive(source: int, group: ProcessGroup, device: torch.device) -> Iterator[tuple[str, Any]]:
    while True:
        header = receive_object(source=source, group=group, device=device)
        if header is None:
            return
        name, value = header
        if isinstance(value, Tensor):
            buffer = torch.empty(value.shape, dtype=value.dtype, device=device)
            dist.recv(as_bytes(buffer), src=source, group=group)
            value = buffer if device.type == "cpu" else copy_to_host(buffer)
        yield name, value


@torch.no_grad()
def scatter(layout: Layout, track: Track, full: Mapping[str, Any]) -> None:
    """Scatters full averages from the first rank to all ranks; the inverse of `gather`.

    Args:
        full: read on the first rank only, which reads each value twice, one at a time. It may be a mapping that reads
            tensors from files on access.

    Collective: over the layout's ranks. Memory: one full tensor on each rank; two while tied tensors are compared.
    Raises: ValueError on every rank, before anything changes, when names, shapes or kinds of dtype differ from the
        model's; RuntimeError on every rank when a value cannot be read.
    """
    stored = track.tensors
    shards = {shard.name: shard.averaged_part for shard in layout.shards if shard.name in stored}
    first_rank = FirstRankBroadcast(layout, hint="; the averages are only partly loaded, so load them again")
    mismatch, specs = first_rank.broadcast_result(lambda: _find_mismatches(layout, shards, full))
    if mismatch:
        raise ValueError(f"these full tensors do not match this model: {mismatch}")
    for name, (source, spec) in specs.items():
        shard = shards[name]
        value = first_rank.broadcast_tensor(partial(getitem, full, source), spec, shard.communication_device)
        track.write(name, shard.slice_full(value))


@torch.no_grad()
def copy_into(target: Layout, layout: Layout, averages: Mapping[str, Tensor]) -> None:
    """Writes the entries of `gather` into the live weights of another model.

    Args:
        target: the model that is overwritten.
        layout: the model that has averages.
        averages: as for `gather`.

    Collective: over the layout's ranks, except for tensors that are sharded the same way in both models.
    Memory: one full tensor on each rank.
    Raises: ValueError when names, shapes or ties differ, before anything changes.
    """
    target.require_writable()
    shards_by_name, target_shards_by_name = layout.shards_by_name(), target.shards_by_name()
    names = shards_by_name.keys() | layout.extra_states.keys()
    target_names = target_shards_by_name.keys() | target.extra_states.keys()
    if different := describe_difference("the averaged model", names, "the given model", target_names):
        raise ValueError(f"the models differ: {different}")
    if mismatched := [
        name for name, shard in shards_by_name.items() if target_shards_by_name[name].shape != shard.shape
    ]:
        raise ValueError(f"the models differ in the shapes of {abbreviated(mismatched)}")
    if extra_ties := target.ties_missing_in(layout):
        raise ValueError(
            f"the given model ties {abbreviated(extra_ties)}, and the averaged model does not: untie them in the given "
            "model"
        )
    _require_expandable(target, layout, averages)
    target.wait_for_device()
    for shard, local in _shards_and_values(layout, averages):
        target_shards = _targets_of(shard, target_shards_by_name)
        full = local if all(other.is_sharded_like(shard) for other in target_shards) else shard.full(local, copy_one)
        for other in target_shards:
            if other.local is not local:
                copy_one(other.local, local if other.is_sharded_like(shard) else other.slice_full(full))
                other.increment_other_versions()
    for name, module in layout.extra_states.items():
        if target.extra_states[name] is not module:
            target.extra_states[name].set_extra_state(module.get_extra_state())


def _targets_of(shard: Shard, targets_by_name: Mapping[str, Shard]) -> list[Shard]:
    """The target model's shards of one tensor; several if the tensor is tied in the source model only."""
    return [*{id(targets_by_name[name]): targets_by_name[name] for name in shard.names}.values()]


def _require_expandable(target: Layout, layout: Layout, averages: Mapping[str, Tensor]) -> None:
    """Raise ValueError when a tensor of ``target`` repeats elements (`Tensor.expand`), and the new value does not."""
    targets_by_name = target.shards_by_name()
    for shard, local in _shards_and_values(layout, averages):
        for other in _targets_of(shard, targets_by_name):
            if isinstance(other, ExpandedShard) and not other.is_sharded_like(shard):
                try:
                    other.slice_full(shard.full(local, copy_one))
                except ValueError as error:
                    raise ValueError(f"the averages do not fit {other.name!r} of the given model: {error}") from None


def _shards_and_values(layout: Layout, averages: Mapping[str, Tensor]) -> Iterator[tuple[Shard, Tensor]]:
    """Each averaged part with its average; for tensors without an average, the live shard with its local tensor."""
    for shard in layout.shards:
        average = averages.get(shard.name)
        yield (shard, shard.local) if average is None else (shard.averaged_part, average)


def copy_one(target: Tensor, source: Tensor) -> None:
    """Copy ``source`` to ``target``; copies between a device and the host go through pinned memory."""
    if target.device == source.device or subclass_name(source) or subclass_name(target):
        target.copy_(source)
    else:
        copy_pairs([(target, source)])


def to_cpu(full: Tensor, local: Tensor, dtype: torch.dtype) -> Tensor:
    """``full`` as a contiguous CPU tensor that shares no storage with ``local``."""
    if subclass_name(full):  # such as a frozen quantized weight, which has no dtype to cast to and no single storage
        return full.detach().clone().to("cpu")
    target_dtype = dtype if full.is_floating_point() else full.dtype
    if full.device.type != "cpu":
        copy = torch.empty(full.shape, dtype=target_dtype, device="cpu")
        copy_pairs([(copy, full)])
        return copy
    shares_storage = full.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
    return full.to(target_dtype, copy=shares_storage).contiguous()


def _find_mismatches(
    layout: Layout, shards: Mapping[str, Shard], full: Mapping[str, Any]
) -> tuple[str, dict[str, tuple[str, Any]]]:
    """A message that says how ``full`` differs from the model; per canonical name, the name in ``full`` and the spec.

    The message is empty if ``full`` can be loaded. A tied tensor may be in ``full`` under any of its names.
    """
    present_names = {canonical: [name for name in shard.names if name in full] for canonical, shard in shards.items()}
    specs = {canonical: (names[0], _spec_of(full[names[0]])) for canonical, names in present_names.items() if names}
    mismatches = {
        "unknown names": full.keys() - layout.shards_by_name().keys() - layout.extra_states.keys(),
        "missing names": [canonical for canonical, names in present_names.items() if not names],
        "tied names with different values": [
            name
            for names in present_names.values()
            for name in names[1:]
            if not _is_identical(full[name], full[names[0]])
        ],
        "values that the model's tensor cannot hold": [
            f"{canonical} ({problem})"
            for canonical, (source, spec) in specs.items()
            if isinstance(shard := shards[canonical], ExpandedShard)
            and isinstance(spec, Tensor)
            and spec.shape == shard.shape
            and (problem := _describe_misfit(shard, full[source]))
        ],
        "not tensors": [canonical for canonical, (_, spec) in specs.items() if not isinstance(spec, Tensor)],
        "shapes (expected, got)": [
            f"{canonical} ({tuple(shards[canonical].shape)}, {getattr(spec, 'shape', spec)})"
            for canonical, (_, spec) in specs.items()
            if getattr(spec, "shape", None) != shards[canonical].shape
        ],
        "kinds of dtype (expected, got)": [
            f"{canonical} ({dtype_kind(shards[canonical].owner.dtype)}, {dtype_kind(spec.dtype)})"
            for canonical, (_, spec) in specs.items()
            if isinstance(spec, Tensor) and dtype_kind(spec.dtype) != dtype_kind(shards[canonical].owner.dtype)
        ],
    }
    return "; ".join(f"{kind}: {abbreviated(sorted(names))}" for kind, names in mismatches.items() if names), specs


def _describe_misfit(shard: Shard, value: Tensor) -> str:
    try:
        shard.slice_full(value)
    except ValueError as error:
        return str(error)
    return ""


def _spec_of(value: object) -> Tensor | str:
    """Shape and dtype of a tensor, as a meta tensor; for any other value, the name of its type."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return type(value).__name__


def dtype_kind(dtype: torch.dtype) -> str:
    """The kind of a dtype: a cast within a kind can only round, a cast between kinds may drop other information."""
    if dtype.is_floating_point or dtype.is_complex:
        return "floating" if dtype.is_floating_point else "complex"
    return "boolean" if dtype is torch.bool else "integer"


def _is_identical(left: object, right: object) -> bool:
    """Whether both are the same object or bit-identical tensors, so that NaN equals NaN."""
    if left is right or not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return left is right
    return has_equal_bits(left.cpu(), right.cpu())
