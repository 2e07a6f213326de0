"""Collectives over replicas, the ranks that hold the same weights: comparing them, and gathering their parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.kernels import checksum, chunks, make_scratch, scratch_views
from ema_dist.messages import abbreviated
from ema_dist.sharding import Shard, all_gather, flat_view


def describe_drift(shards: Iterable[Shard]) -> str:
    """Names the tensors that differ between replicas, by checksums of their bits; empty if there are none.

    Collective: over the replicas of each shard; other ranks do not learn of the difference.
    Memory: 8 bytes per tensor and replica.
    """
    drifted: list[str] = []
    for group, group_shards in _group_by_replicas(shards):
        checksums = torch.stack([checksum(shard.local).to(shard.communication_device) for shard in group_shards])
        gathered = checksums.new_empty(group.size(), len(group_shards))
        all_gather(gathered.view(-1), checksums, group=group)
        ranks = dist.get_process_group_ranks(group)
        for shard, column in zip(group_shards, gathered.t().tolist(), strict=True):
            if different := [rank for rank, value in zip(ranks, column, strict=True) if value != column[0]]:
                drifted.append(f"{shard.name} on ranks {different}")
    if not drifted:
        return ""
    return (
        f"replicas should hold the same weights, but these differ from the first one's: {abbreviated(drifted)}. "
        "Averaging would mix them; broadcast the weights from one replica first"
    )


@torch.no_grad()
def all_gather_parts(shards: Iterable[Shard]) -> None:
    """Fill every replica's ``local`` with the averaged parts of all replicas.

    Collective: over the replicas of each split shard. Memory: one scratch of `ema_dist.kernels`.
    """
    for group, split_shards in _group_by_replicas(shard for shard in shards if shard.is_split):
        by_dtype: dict[torch.dtype, list[Shard]] = defaultdict(list)
        for shard in split_shards:
            by_dtype[shard.local.dtype].append(shard)
        for same_dtype in by_dtype.values():
            _broadcast_parts(same_dtype, group)


def _broadcast_parts(shards: list[Shard], group: ProcessGroup) -> None:
    """Each replica in turn sends its parts, in chunks of bounded size; a replica without rows sends nothing."""
    scratch = make_scratch([shard.local for shard in shards]).to(shards[0].communication_device)
    for replica, rank in enumerate(dist.get_process_group_ranks(group)):
        parts = [_replica_part(shard.local, replica, group.size()) for shard in shards]
        for (pieces,) in chunks(parts, max_bytes=scratch.nbytes):
            buffers = scratch_views(scratch, pieces)
            if replica == group.rank():
                torch._foreach_copy_(buffers, pieces)
            dist.broadcast(scratch[: sum(piece.numel() for piece in pieces)], rank, group=group)
            if replica != group.rank():
                torch._foreach_copy_(pieces, buffers)


def _replica_part(local: Tensor, replica: int, count: int) -> Tensor:
    """The elements of one replica's rows, as a 1-D view."""
    rows = local.shape[0]
    part_numel = -(-rows // count) * (local.numel() // max(rows, 1))
    return flat_view(local)[replica * part_numel : (replica + 1) * part_numel]


def _group_by_replicas(shards: Iterable[Shard]) -> list[tuple[ProcessGroup, list[Shard]]]:
    groups: dict[ProcessGroup, list[Shard]] = {}
    for shard in shards:
        if shard.replica_group is not None and shard.replica_group.size() > 1:
            groups.setdefault(shard.replica_group, []).append(shard)
    return list(groups.items())
