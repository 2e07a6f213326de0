"""Makes the shard that the wrapper of a tensor requires, and the meshes over which averages are split."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from ema_dist.sharding.mesh_shard import MeshShard, dtensor_local, permute_mesh, split_rows
from ema_dist.sharding.names import NamedModule
from ema_dist.sharding.plain_shard import PlainShard
from ema_dist.sharding.rank_sets import group_ranks, mesh_ranks
from ema_dist.sharding.shard import Shard, has_contiguous_rows

_meshes_by_model: MutableMapping[nn.Module, dict[object, DeviceMesh]] = WeakKeyDictionary()
"""The meshes made for each model: they are the same whenever it is read again, so that shards are compared quickly.

By model, because a mesh holds its process groups: by group, it would keep itself alive.
"""


class ShardFactory:
    """Makes shards of a model, and one mesh for all shards over the same replicas: a mesh for each would be slow."""

    def __init__(self, model: nn.Module, *, split: bool) -> None:
        self._split = split
        self._meshes = _meshes_by_model.setdefault(model, {})
        self._overlaps: dict[object, bool] = {}

    def shard_maker(
        self, tensor: Tensor, parent: NamedModule, *, is_buffer: bool
    ) -> Callable[[tuple[str, ...]], Shard]:
        is_unreplicated = is_buffer or id(tensor) in parent.ignored_ids
        replica_group = (
            None
            if is_unreplicated or parent.replica_group is None or parent.replica_group.size() == 1
            else parent.replica_group
        )
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
        if outer_group is not None and self._overlap(outer_group, mesh):
            outer_group = None  # ranks of one mesh hold different blocks, so they are not replicas of each other
        if partial := [placement for placement in placements if placement.is_partial()]:
            raise ValueError(f"{names[0]!r} is placed {partial}: a sum still to be made is not a weight to average")
        replica_dims = [
            dim for dim, placement in enumerate(placements) if placement.is_replicate() and mesh.size(dim) > 1
        ]
        shard = MeshShard(
            names,
            dtensor_local(tensor),
            tensor,
            mesh=mesh,
            placements=placements,
            shape=tensor.shape,
            stride=tensor.stride(),
            replica_group=mesh.get_group(replica_dims[0]) if replica_dims else outer_group,
        )
        # A strided placement (FSDP2 over TP) has its own order of mesh dimensions: such a block is not split further.
        is_unstrided = all(type(placement) in (ShardPlacement, Replicate) for placement in placements)
        if replica_dims and split and is_unstrided and has_contiguous_rows(shard.local):
            other_dims = [dim for dim in range(mesh.ndim) if dim != replica_dims[0]]
            permuted_mesh = self._permuted_mesh(mesh, [*other_dims, replica_dims[0]])
            shard.averaged_part = split_rows(
                shard, permuted_mesh, [placements[dim] for dim in other_dims], tensor.stride()
            )
        return shard

    def _overlap(self, group: ProcessGroup, mesh: DeviceMesh) -> bool:
        """Whether several ranks of ``group`` are in ``mesh``."""
        key = group, mesh
        if key not in self._overlaps:
            self._overlaps[key] = len(group_ranks(group).as_set & mesh_ranks(mesh).as_set) > 1
        return self._overlaps[key]

    def _permuted_mesh(self, mesh: DeviceMesh, order: list[int]) -> DeviceMesh:
        """The same mesh with its dimensions in another order."""
        if order == list(range(mesh.ndim)):
            return mesh
        key = mesh, tuple(order)
        if key not in self._meshes:
            self._meshes[key] = permute_mesh(mesh, order, mesh.device_type)
        return self._meshes[key]
