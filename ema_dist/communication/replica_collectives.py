"""Collectives over replicas, the ranks that hold the same weights: comparing them, and gathering their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.communication.row_exchange import part_numel, prepare_all_gather, prepare_all_reduce
from ema_dist.kernels import checksum
from ema_dist.messages import abbreviated, describe_ranks
from ema_dist.sharding import Shard, all_gather, group_ranks, sending_device

MAX_PADDING_RATIO = 2
"""Tensors for which a padded all-gather would send more than this multiple of their bytes are all-reduced."""

MAX_LOCATED = 10
"""The maximum number of tensors whose ranks a message lists."""


def describe_drift(shards: Iterable[Shard]) -> str:
    """Names the tensors that differ between replicas, by checksums of their bits; empty if there are none.

    Collective: over the replicas of each shard; each rank gets only the differences in its own replica groups. One
    all-reduce of 16 bytes for each tensor; if tensors differ, also an all-gather of the first `MAX_LOCATED` checksums.
    """
    drifted: list[str] = []
    for group, group_shards in _group_by_replicas(shards):
        device = sending_device(group, *(shard.communication_device for shard in group_shards))
        checksums = torch.stack([checksum(shard.local).to(device) for shard in group_shards])
        # The largest complement belongs to the smallest checksum, so one all-reduce finds both extremes.
        bounds = torch.stack([checksums, ~checksums])
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
        different = (bounds[0] != ~bounds[1]).nonzero().flatten().tolist()
        if not different:
            continue
        located = checksums[different[:MAX_LOCATED]]
        gathered = located.new_empty(group.size(), len(located))
        all_gather(gathered.view(-1), located, group=group)
        ranks = torch.tensor(group_ranks(group).ranks, device="cpu")
        differs = (gathered != gathered[0]).t().cpu()
        for index, is_other in zip(different[:MAX_LOCATED], differs, strict=True):
            drifted.append(f"{group_shards[index].name} on {describe_ranks(ranks[is_other].tolist())}")
        drifted += [group_shards[index].name for index in different[MAX_LOCATED:]]
    if not drifted:
        return ""
    return (
        f"replicas should hold the same weights, but these differ from the first one's: {abbreviated(drifted)}. "
        "Averaging would mix them; broadcast the weights from one replica first"
    )


def all_gather_parts(shards: Iterable[Shard]) -> None:
    """Fill every replica's ``local`` with the averaged parts of all replicas; see `prepare_all_gather_parts`."""
    prepare_all_gather_parts(shards)()


def prepare_all_gather_parts(shards: Iterable[Shard]) -> Callable[[], None]:
    """Returns a function that fills every replica's ``local`` with the averaged parts of all replicas.

    Memory is allocated here, so that a rank that runs out of memory does not leave the others in a collective. If the
    function fails, it can be called again: it writes only to rows that other replicas own, or writes the bits that a
    replica's own rows already have.

    The parts of several tensors are sent together, as bytes. Padding adds at most a tenth if each replica has ten rows
    or more, and nothing if rows divide evenly. A tensor that padding would more than double is all-reduced instead,
    which sends each byte twice.

    Collective: the returned function, over the replicas of each split shard. The number of collectives depends on the
    bytes of the tensors, not on the number of replicas.
    Memory: one scratch of `ema_dist.kernels` for each combination of replica group, tensor device and kind of
        collective; the same on the device that communicates, if it is a different one; and what the backend needs.
    """
    collectives: list[Callable[[], None]] = []
    for group, split_shards in _group_by_replicas(shard for shard in shards if shard.is_split):
        devices = {shard.communication_device: None for shard in split_shards}
        sending_devices = {device: sending_device(group, device, *devices) for device in devices}
        batches: dict[tuple[torch.device, torch.device, bool], list[Tensor]] = {}
        for shard in split_shards:
            local, replicas = shard.local, group.size()
            is_padded = part_numel(local, replicas) * replicas <= MAX_PADDING_RATIO * local.numel()
            if local.numel():
                device = sending_devices[shard.communication_device]
                batches.setdefault((local.device, device, is_padded), []).append(local)
        for (_, device, is_padded), tensors in batches.items():
            collectives.append((prepare_all_gather if is_padded else prepare_all_reduce)(tensors, group, device))

    @torch.no_grad()
    def run() -> None:
        for collective in collectives:
            collective()

    return run


def _group_by_replicas(shards: Iterable[Shard]) -> list[tuple[ProcessGroup, list[Shard]]]:
    groups: dict[ProcessGroup, list[Shard]] = {}
    for shard in shards:
        if shard.replica_group is not None and shard.replica_group.size() > 1:
            groups.setdefault(shard.replica_group, []).append(shard)
    return list(groups.items())
