"""Makes the shard that the wrapper of a tensor requires, and the meshes over which averages are split."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import Placement

from ema_dist.sharding import compat
from ema_dist.sharding.mesh_shard import MeshShard, dtensor_local, permute_mesh, split_rows
from ema_dist.sharding.names import NamedModule
from ema_dist.sharding.plain_shard import PlainShard
from ema_dist.sharding.rank_sets import group_ranks, is_known_to_torch, mesh_ranks
from ema_dist.sharding.shard import Shard, has_contiguous_rows

_meshes_by_model: MutableMapping[nn.Module, dict[object, DeviceMesh]] = WeakKeyDictionary()
"""The meshes made for each model. They are reused when the model is read again, so that shards compare quickly.

Keyed by model: a mesh references its process groups, so a mesh keyed by its group would keep itself alive.
"""


class _Replication(NamedTuple):
    """How tensors with the same mesh and placements are replicated; found once, because finding it is slow."""

    group: ProcessGroup | None
    rows_mesh: DeviceMesh | None = None
    """The mesh with the replicas as its last dimension, over which rows are split; None if rows cannot be split."""
    other_placements: tuple[Placement, ...] = ()
    """The placements over the other dimensions of `rows_mesh`."""


class ShardFactory:
    """Makes shards of a model, and one mesh for all shards over the same replicas: a mesh for each would be slow."""

    def __init__(self, model: nn.Module, *, split: bool) -> None:
        self._split = split
        self._meshes = _meshes_by_model.setdefault(model, {})
        self._replications: dict[object, _Replication] = {}

    def shard_maker(
        self, tensor: Tensor, parent: NamedModule, *, is_buffer: bool
    ) -> Callable[[tuple[str, ...]], Shard]:
        is_unreplicated = is_buffer or id(tensor) in parent.ignored_ids
        replica_group = None if is_unreplicated else parent.replica_group
        if replica_group is not None and not is_known_to_torch(replica_group):
            if self._split:
                raise ValueError(
                    f"the model is replicated over a {type(replica_group).__name__}, a process group whose ranks "
                    "torch.distributed does not know (as in torchft, where replicas join and leave), so averages "
                    'cannot be split among the replicas: pass replicas="copy"'
                )
            replica_group = None
        if replica_group is not None and replica_group.size() == 1:
            replica_group = None
        if isinstance(tensor, DTensor):
            return lambda names: self._mesh_shard(names, tensor, replica_group, split=self._split and not is_buffer)
        return lambda names: self._plain_shard(names, tensor, replica_group)

    def _plain_shard(self, names: tuple[str, ...], tensor: Tensor, replica_group: ProcessGroup | None) -> Shard:
        shard = PlainShard(names, tensor.detach(), tensor, replica_group=replica_group)
        if replica_group is not None and self._split and has_contiguous_rows(shard.local):
            key = replica_group, tensor.device.type
            if key not in self._meshes:
                self._meshes[key] = DeviceMesh.from_group(replica_group, tensor.device.type)
            shard.averaged_part = split_rows(shard, self._meshes[key], [], tensor.stride())
        return shard

    def _mesh_shard(
        self, names: tuple[str, ...], tensor: DTensor, outer_group: ProcessGroup | None, *, split: bool
    ) -> Shard:
        mesh, placements = tensor.device_mesh, tensor.placements
        key = mesh, placements, outer_group
        replication = self._replications.get(key)
        if replication is None:
            if partial := [placement for placement in placements if placement.is_partial()]:
                raise ValueError(
                    f"{names[0]!r} is placed {partial}, a sum that is not computed yet, and cannot be averaged: "
                    "redistribute it to Shard or Replicate placements first"
                )
            replication = self._replications[key] = self._replication(mesh, placements, outer_group)
        shard = MeshShard(
            names,
            dtensor_local(tensor),
            tensor,
            mesh=mesh,
            placements=placements,
            shape=tensor.shape,
            stride=tensor.stride(),
            replica_group=replication.group,
        )
        if (uneven := shard.uneven_strided_dims) and not compat.GATHERS_UNEVEN_STRIDED_SHARDS:
            dim, count = next(iter(uneven.items()))
            raise ValueError(
                f"{names[0]!r} of shape {tuple(tensor.shape)}: FSDP2 over tensor parallelism splits dimension {dim} "
                f"unevenly, and torch {torch.__version__} gathers and saves it wrongly: use a size divisible by "
                f"{count}, or torch 2.11 or later"
            )
        if replication.rows_mesh is not None and split and has_contiguous_rows(shard.local):
            shard.averaged_part = split_rows(
                shard, replication.rows_mesh, replication.other_placements, tensor.stride()
            )
        return shard

    def _replication(
        self, mesh: DeviceMesh, placements: tuple[Placement, ...], outer_group: ProcessGroup | None
    ) -> _Replication:
        if outer_group is not None and len(group_ranks(outer_group).as_set & mesh_ranks(mesh).as_set) > 1:
            outer_group = None  # ranks of one mesh hold different blocks, so they are not replicas of each other
        replica_dims = [
            dim for dim, placement in enumerate(placements) if placement.is_replicate() and mesh.size(dim) > 1
        ]
        if not replica_dims:
            return _Replication(outer_group)
        replica_dim = replica_dims[0]
        # A strided placement (FSDP2 over TP) has its own order of mesh dimensions: such a block is not split further.
        if any(type(placement) not in (ShardPlacement, Replicate) for placement in placements):
            return _Replication(mesh.get_group(replica_dim))
        other_dims = [dim for dim in range(mesh.ndim) if dim != replica_dim]
        return _Replication(
            mesh.get_group(replica_dim),
            self._permuted_mesh(mesh, [*other_dims, replica_dim]),
            tuple(placements[dim] for dim in other_dims),
        )

    def _permuted_mesh(self, mesh: DeviceMesh, order: list[int]) -> DeviceMesh:
        """The same mesh with its dimensions in another order."""
        if order == list(range(mesh.ndim)):
            return mesh
        key = mesh, tuple(order)
        if key not in self._meshes:
            self._meshes[key] = permute_mesh(mesh, order, mesh.device_type)
        return self._meshes[key]
