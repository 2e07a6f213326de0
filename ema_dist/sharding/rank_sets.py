"""The ranks of process groups and meshes, read once and cached: reading them for each tensor is slow on many ranks."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cached_property, partial
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

MAX_RANKS_IN_TEXT = 16


class RankSet:
    """Global ranks, in the order of a process group or of a mesh of the given shape.

    Tensors on one group or mesh share one object, so that comparing their ranks is a comparison of identities.
    """

    def __init__(self, ranks: tuple[int, ...], shape: tuple[int, ...]) -> None:
        self.ranks = ranks
        self.shape = shape

    @cached_property
    def as_set(self) -> frozenset[int]:
        """The ranks without their order; always the same object, whose hash is computed once."""
        return frozenset(self.ranks)

    @cached_property
    def text(self) -> str:
        """The ranks for messages, shortened if there are many."""
        if len(self.ranks) <= MAX_RANKS_IN_TEXT:
            return str([*self.ranks] if len(self.shape) == 1 else _nested(self.ranks, self.shape))
        return f"{' x '.join(map(str, self.shape))} ranks, {self.ranks[0]} to {self.ranks[-1]}"

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, RankSet) and (self.shape, self.ranks) == (other.shape, other.ranks)

    def __hash__(self) -> int:
        return hash((self.shape, self.as_set))


_by_group: MutableMapping[ProcessGroup, RankSet] = WeakKeyDictionary()
_by_mesh: MutableMapping[DeviceMesh, RankSet] = WeakKeyDictionary()
_groups_by_mesh: dict[int, tuple[ref[DeviceMesh], dict[int, ProcessGroup]]] = {}
"""Keyed by the ids of living meshes: equal meshes may have different groups, if the world was initialized again."""


def is_known_to_torch(group: ProcessGroup) -> bool:
    """Whether torch.distributed knows the ranks of ``group``; it does not if another package made the group."""
    try:
        group_ranks(group)
    except KeyError:
        return False
    return True


def group_ranks(group: ProcessGroup) -> RankSet:
    """The global ranks of ``group``, by their ranks in it."""
    rank_set = _by_group.get(group)
    if rank_set is None:
        ranks = tuple(dist.get_process_group_ranks(group))
        rank_set = _by_group[group] = RankSet(ranks, (len(ranks),))
    return rank_set


def mesh_ranks(mesh: DeviceMesh) -> RankSet:
    """The global ranks of ``mesh``, in row-major order of its dimensions."""
    # Equal meshes share one entry. It has no coordinate of this process, which may have another rank in another world.
    rank_set = _by_mesh.get(mesh)
    if rank_set is None:
        rank_set = _by_mesh[mesh] = RankSet(tuple(mesh.mesh.flatten().tolist()), tuple(mesh.mesh.shape))
    return rank_set


def mesh_group(mesh: DeviceMesh, dim: int) -> ProcessGroup:
    """As ``mesh.get_group(dim)``, which in torch 2.7 compares all ranks of all groups whenever it is called."""
    entry = _groups_by_mesh.get(id(mesh))
    if entry is None or entry[0]() is not mesh:
        entry = _groups_by_mesh[id(mesh)] = ref(mesh, partial(_forget_groups, id(mesh))), dict[int, ProcessGroup]()
    groups = entry[1]
    if dim not in groups:
        groups[dim] = mesh.get_group(dim)
    return groups[dim]


def _forget_groups(mesh_id: int, _: object) -> None:
    _groups_by_mesh.pop(mesh_id, None)


def _nested(ranks: tuple[int, ...], shape: tuple[int, ...]) -> list[object]:
    if len(shape) == 1:
        return [*ranks]
    step = len(ranks) // shape[0]
    return [_nested(ranks[start : start + step], shape[1:]) for start in range(0, len(ranks), step)]
