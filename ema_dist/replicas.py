"""Ranks that hold the same weights: checking that they do, and filling each other's copies from their parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.kernels import checksum
from ema_dist.shards import Shard, all_gather, flat


def drift(shards: Iterable[Shard]) -> str:
    """How what replicas hold alike differs among them, by checksums of their bits; empty when it does not.

    Collective: over the replicas of each shard, which alone get to know. Memory: 8 bytes per tensor and replica.
    """
    drifted: dict[str, list[int]] = {}
    for group, alike in _by_group(shards):
        sums = torch.stack([checksum(shard.local).to(shard.device) for shard in alike])
        everyones = sums.new_empty(group.size(), len(alike))
        all_gather(everyones.view(-1), sums, group=group)
        ranks = dist.get_process_group_ranks(group)
        for shard, column in zip(alike, everyones.t().tolist(), strict=True):
            if different := [rank for rank, its in zip(ranks, column, strict=True) if its != column[0]]:
                drifted[shard.name] = different
    if not drifted:
        return ""
    return (
        f"replicas should hold the same weights, but these differ from the first one's (name: ranks): {drifted}. "
        "Averaging would mix them; broadcast the weights from one replica first"
    )


@torch.no_grad()
def fill_from_parts(shards: Iterable[Shard], *, limit: int) -> None:
    """Fill every replica's ``local`` with the parts that the replicas hold in theirs.

    Collective: over the replicas of each split shard. Memory: buffers of ``limit`` bytes in all.
    """
    for group, split in _by_group(shard for shard in shards if shard.is_split):
        by_dtype: dict[torch.dtype, list[Shard]] = defaultdict(list)
        for shard in split:
            by_dtype[shard.local.dtype].append(shard)
        for alike in by_dtype.values():
            _fill_alike(alike, group, limit)


def _fill_alike(shards: list[Shard], group: ProcessGroup, limit: int) -> None:
    """Fill weights of one dtype."""
    dtype, count = shards[0].local.dtype, group.size()
    # What is sent and what is received, of which gloo holds up to four copies (measured).
    affordable = max(1, limit // (dtype.itemsize * (5 * count + 1)))
    per_rank = min(affordable, sum(_per_part(shard.local, count) for shard in shards))
    sent = torch.empty(per_rank, dtype=dtype, device=shards[0].device)
    received = torch.empty(count, per_rank, dtype=dtype, device=shards[0].device)
    for bucket in _buckets(shards, count, per_rank):
        _fill(bucket, sent, received, group)


def _per_part(local: Tensor, count: int) -> int:
    """Elements in the largest part when ``count`` replicas share the rows."""
    rows = local.shape[0]
    return -(-rows // count) * (local.numel() // max(rows, 1))


class _Slice(NamedTuple):
    """Elements ``start .. stop`` of every replica's part of one shard, as far as its part goes."""

    local: Tensor
    per_part: int
    start: int
    stop: int

    def of(self, replica: int) -> Tensor:
        first = replica * self.per_part
        last = min(first + self.per_part, self.local.numel())
        return self.local[min(first + self.start, last) : min(first + self.stop, last)]


def _buckets(shards: Sequence[Shard], count: int, per_rank: int) -> Iterator[list[_Slice]]:
    bucket: list[_Slice] = []
    room = per_rank
    for shard in shards:
        local = flat(shard.local)
        per_part = _per_part(shard.local, count)
        start = 0
        while start < per_part:
            stop = min(start + room, per_part)
            bucket.append(_Slice(local, per_part, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield bucket
                bucket, room = list[_Slice](), per_rank
    if bucket:
        yield bucket


def _fill(bucket: list[_Slice], sent: Tensor, received: Tensor, group: ProcessGroup) -> None:
    sizes = [piece.stop - piece.start for piece in bucket]
    sent, received = sent[: sum(sizes)], received.view(-1)[: sum(sizes) * group.size()].view(group.size(), -1)
    mine = [piece.of(group.rank()) for piece in bucket]
    torch._foreach_copy_([at[: len(it)] for at, it in zip(sent.split(sizes), mine, strict=True)], mine)
    all_gather(received.view(-1), sent, group=group)
    for replica in range(group.size()):
        if replica != group.rank():
            theirs = [piece.of(replica) for piece in bucket]
            arrived = received[replica].split(sizes)
            torch._foreach_copy_(theirs, [at[: len(it)] for at, it in zip(arrived, theirs, strict=True)])


def _by_group(shards: Iterable[Shard]) -> list[tuple[ProcessGroup, list[Shard]]]:
    groups: dict[ProcessGroup, list[Shard]] = {}
    for shard in shards:
        if shard.replicas is not None and shard.replicas.size() > 1:
            groups.setdefault(shard.replicas, []).append(shard)
    return list(groups.items())
