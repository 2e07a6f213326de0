"""Tensors sharded over a device mesh: FSDP2, HSDP, tensor parallelism, and averages split over replicas."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from math import prod
from operator import attrgetter
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta  # no public names
from torch.distributed.tensor.placement_types import Placement

from ema_dist.sharding.devices import current_device
from ema_dist.sharding.gather_rows import gather_dim
from ema_dist.sharding.rank_sets import mesh_group, mesh_ranks
from ema_dist.sharding.shard import CopyFunction, Shard


class _Block(NamedTuple):
    """The part of a tensor that one rank holds."""

    starts: list[int]
    sizes: list[int]
    lengths: list[int]
    """For each dimension of the mesh, the length that it splits."""


class MeshShard(Shard):
    """The block of the tensor that DTensor placements give to this rank."""

    def __init__(
        self,
        names: tuple[str, ...],
        local: Tensor,
        owner: Tensor,
        *,
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        shape: torch.Size,
        stride: tuple[int, ...],
        replica_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(names, local, owner, replica_group=replica_group)
        self.mesh = mesh
        self.placements: tuple[Placement, ...] = tuple(placements)
        self._shape = shape
        self.stride = stride

    @property
    def version(self) -> tuple[object, ...]:
        return *super().version, self.local._version  # the owner is another tensor, with its own version counter

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def global_offset(self) -> int:
        sharding_dims = [
            (dim, placement) for dim, placement in enumerate(self.placements) if not placement.is_replicate()
        ]
        if all(type(placement) is ShardPlacement and placement.dim == 0 for _, placement in sharding_dims):
            starts = self._block().starts
            return starts[0] * self.stride[0] if starts else 0
        ranks, coordinate = mesh_ranks(self.mesh), _coordinate(self.mesh)
        block_index, sizes = 0, list(self._shape)
        for dim, placement in sharding_dims:
            block_index = block_index * ranks.shape[dim] + coordinate[dim]
            sharded_dim: int = placement.dim  # pyrefly: ignore[missing-attribute]  strided placements have it
            sizes[sharded_dim] = -(-sizes[sharded_dim] // ranks.shape[dim])
        return block_index * prod(sizes)

    @property
    def communication_device(self) -> torch.device:
        if self.local.device.type == self.mesh.device_type:
            return self.local.device
        return current_device(self.mesh.device_type)

    @property
    def gather_ranks(self) -> frozenset[int]:
        return mesh_ranks(self.mesh).as_set

    @property
    def gather_group(self) -> ProcessGroup | None:
        return mesh_group(self.mesh, 0) if self.mesh.ndim == 1 else None

    def wrap(self, local: Tensor) -> DTensor:
        mesh = self.mesh
        if local.device.type != mesh.device_type:  # else DTensor would communicate on a device that does not hold it
            mesh = _mesh_for_device_type(mesh, local.device.type)
        # The public from_local() takes twice as long for each tensor, because it goes through autograd.
        spec = DTensorSpec(mesh, self.placements, tensor_meta=TensorMeta(self._shape, self.stride, local.dtype))
        return DTensor(local.view_as(local), spec, requires_grad=False)

    def unwrap(self, value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return self.slice_full(value)
        same_ranks = value.device_mesh == self.mesh or mesh_ranks(value.device_mesh) == mesh_ranks(self.mesh)
        if value.shape != self.shape or not same_ranks or value.placements != self.placements:
            raise ValueError(
                f"expected {tuple(self.shape)} placed {self.placements} on {self.mesh}, "
                f"got {tuple(value.shape)} placed {value.placements} on {value.device_mesh}"
            )
        # An unpickled mesh keeps the coordinate of the rank that wrote it.
        if (coordinate := value.device_mesh.get_coordinate()) != self.mesh.get_coordinate():
            position = tuple(coordinate or ())  # torch 2.7 has a list
            raise ValueError(f"expected this rank's part, got the part at {position} of {value.device_mesh}")
        return dtensor_local(value)

    def full(self, local: Tensor, copy_local: CopyFunction = Tensor.copy_) -> Tensor:
        if local.device != self.communication_device:
            offloaded, local = local, torch.empty_like(local, device=self.communication_device)
            copy_local(local, offloaded)
        if self._is_strided:
            return self.wrap(local).full_tensor()
        lengths = self._block().lengths
        for mesh_dim in reversed(range(self.mesh.ndim)):
            placement = self.placements[mesh_dim]
            if isinstance(placement, ShardPlacement):
                local = gather_dim(local, placement.dim, lengths[mesh_dim], mesh_group(self.mesh, mesh_dim))
        return local

    def slice_full(self, full: Tensor) -> Tensor:
        if full.shape != self.shape:
            raise ValueError(f"expected {tuple(self.shape)}, got {tuple(full.shape)}")
        if self._is_strided:
            full = full.to(self.communication_device)
            replicated = DTensor.from_local(full, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
            return dtensor_local(replicated.redistribute(placements=self.placements))
        # redistribute() would make the chunks of all ranks to return one of them.
        block = self._block()
        for dim, (start, size) in enumerate(zip(block.starts, block.sizes, strict=True)):
            full = full.narrow(dim, start, size)
        return full

    def local_state(self, state: Tensor) -> Tensor | None:
        if isinstance(state, DTensor):
            has_same_placement = state.device_mesh == self.mesh and state.placements == self.placements
            return dtensor_local(state) if has_same_placement and state.shape == self.shape else None
        return state.detach() if state.shape == self.local.shape else None

    @property
    def _is_strided(self) -> bool:
        """Whether any placement is strided (FSDP2 over TP): only DTensor knows the order of such blocks."""
        return any(type(placement) not in (ShardPlacement, Replicate) for placement in self.placements)

    @property
    def uneven_strided_dims(self) -> dict[int, int]:
        """The dimensions that strided placements split unevenly, each with the number of blocks."""
        if not self._is_strided:
            return {}
        blocks: dict[int, int] = {}
        for mesh_dim, placement in enumerate(self.placements):
            if not placement.is_replicate():
                dim: int = placement.dim  # pyrefly: ignore[missing-attribute]  strided placements have it
                blocks[dim] = blocks.get(dim, 1) * self.mesh.size(mesh_dim)
        return {dim: count for dim, count in blocks.items() if self._shape[dim] % count}

    def _block(self) -> _Block:
        """This rank's block; requires ``not self._is_strided``."""
        ranks, coordinate = mesh_ranks(self.mesh), _coordinate(self.mesh)
        sizes, starts = list(self._shape), [0] * len(self._shape)
        lengths: list[int] = []
        for mesh_dim, placement in enumerate(self.placements):
            dim = placement.dim if isinstance(placement, ShardPlacement) else 0
            lengths.append(sizes[dim] if sizes else 0)
            if isinstance(placement, ShardPlacement):
                chunk_size = -(-sizes[dim] // ranks.shape[mesh_dim])
                begin = min(chunk_size * coordinate[mesh_dim], sizes[dim])
                starts[dim] += begin
                sizes[dim] = min(chunk_size, sizes[dim] - begin)
        return _Block(starts, sizes, lengths)

    @property
    def summary(self) -> str:
        placements_text = ", ".join(str(placement) for placement in self.placements)
        return f"{placements_text} over a mesh of {' x '.join(map(str, mesh_ranks(self.mesh).shape))} ranks"

    def sharding_key(self) -> tuple[object, ...]:
        # The types are included, because in some versions of torch a strided placement equals one that is not strided.
        typed_placements = tuple((type(placement), placement) for placement in self.placements)
        return tuple(self._shape), typed_placements, mesh_ranks(self.mesh)

    @property
    def sharding_text(self) -> str:
        placements = ", ".join(map(repr, self.placements))
        return f"a tensor of shape {tuple(self._shape)}, placed {placements} over ranks {mesh_ranks(self.mesh).text}"


_meshes_by_device_type: MutableMapping[DeviceMesh, dict[str, DeviceMesh]] = WeakKeyDictionary()
"""For each mesh, meshes of the same ranks for other types of devices."""


def _mesh_for_device_type(mesh: DeviceMesh, device_type: str) -> DeviceMesh:
    """The same mesh for tensors on another type of device; DCP reads only ranks and coordinates from it."""
    by_device_type = _meshes_by_device_type.setdefault(mesh, {})
    if device_type not in by_device_type:
        by_device_type[device_type] = permute_mesh(mesh, range(mesh.ndim), device_type)
    return by_device_type[device_type]


def permute_mesh(mesh: DeviceMesh, order: Sequence[int], device_type: str) -> DeviceMesh:
    """The mesh with dimensions in another order, on its existing groups; the constructor would make new groups."""
    return DeviceMesh.from_group(
        [mesh.get_group(dim) for dim in order],
        device_type,
        mesh=mesh.mesh.permute(list(order)).contiguous(),
        mesh_dim_names=tuple(f"dim_{dim}" for dim in order),
    )


def _call_to_local(value: DTensor) -> Tensor:
    with torch.no_grad():  # with autograd, to_local() returns a view that records history
        return value.to_local()


# to_local() takes microseconds for each parameter of each call: this private attribute is read instead if it exists.
dtensor_local: Callable[[DTensor], Tensor] = (
    attrgetter("_local_tensor") if "_local_tensor" in getattr(DTensor, "__slots__", ()) else _call_to_local
)
"""The tensor that a DTensor holds on this rank, not a view of it."""


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's plain tensor inside a parameter or buffer, without autograd: the same storage and version counter."""
    return dtensor_local(tensor) if isinstance(tensor, DTensor) else tensor.detach()


def split_rows(shard: Shard, mesh: DeviceMesh, placements: Sequence[Placement], stride: tuple[int, ...]) -> MeshShard:
    """The rows of ``shard.local`` that this rank averages; the replicas are the last dimension of ``mesh``."""
    return MeshShard(
        shard.names,
        chunk_of_rows(shard.local, mesh_ranks(mesh).shape[-1], _coordinate(mesh)[-1]),
        shard.owner,
        mesh=mesh,
        placements=[*placements, ShardPlacement(0)],
        shape=shard.shape,
        stride=stride,
    )


def _coordinate(mesh: DeviceMesh) -> Sequence[int]:
    """The index of this rank in each dimension of ``mesh``."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank that has a DTensor is in its mesh"
    return coordinate


def chunk_of_rows(tensor: Tensor, count: int, index: int) -> Tensor:
    """One of ``count`` chunks of rows, as ``Shard(0)`` makes them; the last ones may be smaller or empty."""
    rows = tensor.shape[0]
    chunk_size = -(-rows // count)
    start = min(chunk_size * index, rows)
    return tensor.narrow(0, start, min(chunk_size, rows - start))
