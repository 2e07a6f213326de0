"""Finding the tensors of a model: each once, with all of its names and the shard that fits its wrapping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Rows

from ema_dist.sharding import fsdp1
from ema_dist.sharding.mesh_shard import MeshShard, local_of, on_groups_of, split_rows
from ema_dist.sharding.names import Place, places
from ema_dist.sharding.registries import Site, live_behind
from ema_dist.sharding.shard import Shard, splits_by_rows
from ema_dist.sharding.whole_shard import WholeShard

Replicas: TypeAlias = Literal["shard", "copy"] | ProcessGroup
"""What is kept of weights that replicas hold alike; a process group says over which ranks an unwrapped model is one."""


@dataclass(frozen=True)
class Found:
    """One tensor of the model: tied names lead to the same one."""

    make: Callable[[tuple[str, ...]], Shard]
    is_buffer: bool
    names: list[str] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)


def find(model: nn.Module, replicas: Replicas) -> tuple[list[Found], dict[str, nn.Module]]:
    """Everything the unwrapped model's ``state_dict()`` holds: tensors, and modules with an extra state by its name."""
    flat = fsdp1.flat_tensors(model)
    make = _Maker(split=replicas != "copy")
    found: dict[object, Found] = {}
    extra_states = {}
    for place in places(Place(model, replicas=replicas if isinstance(replicas, ProcessGroup) else None)):
        module, in_flat = place.module, flat.get(id(place.module), {})
        for name, flat_tensor in in_flat.items():
            tensor = found.setdefault(flat_tensor.key, Found(flat_tensor.make, is_buffer=False))
            tensor.names.append(place.prefix + name)
        for is_buffer, registry, name, shown in _registered(module):
            if name in in_flat:
                continue
            value = live_behind(shown)
            if getattr(value, "_fsdp_flattened", False):  # set by FSDP1 on what it shows of a flat parameter
                raise ValueError(
                    f"{place.prefix + name!r} is a piece of a flat parameter of FSDP1, which is wrapped around this "
                    "module: pass the FullyShardedDataParallel module itself"
                )
            tensor = found.setdefault(id(value), Found(make.for_tensor(value, place, is_buffer=is_buffer), is_buffer))
            tensor.names.append(place.prefix + name)
            tensor.sites.append(Site(module, registry, name))
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            extra_states[f"{place.prefix}_extra_state"] = module
    return list(found.values()), extra_states


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's plain tensor inside a parameter or buffer, without autograd: the same storage and version counter."""
    return local_of(tensor) if isinstance(tensor, DTensor) else tensor.detach()


def _registered(module: nn.Module) -> Iterator[tuple[bool, dict[str, Any], str, Tensor]]:
    # named_parameters() and named_buffers() hide which buffers are persistent, and the registries themselves,
    # in which Layout looks a tensor up again.
    for name, parameter in module._parameters.items():
        if parameter is not None and not isinstance(parameter, FlatParameter):
            yield False, module._parameters, name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield True, module._buffers, name, buffer


class _Maker:
    """Builds shards; meshes over the same replicas are built once."""

    def __init__(self, *, split: bool) -> None:
        self._split = split
        self._meshes: dict[object, DeviceMesh] = {}

    def for_tensor(self, tensor: Tensor, place: Place, *, is_buffer: bool) -> Callable[[tuple[str, ...]], Shard]:
        alone = is_buffer or id(tensor) in place.unsynchronised
        replicas = None if alone or place.replicas is None or place.replicas.size() == 1 else place.replicas
        if isinstance(tensor, DTensor):
            return lambda names: self._on_mesh(names, tensor, replicas, split=self._split and not is_buffer)
        return lambda names: self._whole(names, tensor, replicas)

    def _whole(self, names: tuple[str, ...], tensor: Tensor, replicas: ProcessGroup | None) -> Shard:
        shard = WholeShard(names, tensor.detach(), tensor, replicas=replicas)
        if replicas is not None and self._split and splits_by_rows(shard.local):
            key = replicas, tensor.device.type
            if key not in self._meshes:
                self._meshes[key] = DeviceMesh.from_group(replicas, tensor.device.type)
            shard.part = split_rows(shard, self._meshes[key], [], tensor.stride())
        return shard

    def _on_mesh(self, names: tuple[str, ...], tensor: DTensor, around: ProcessGroup | None, *, split: bool) -> Shard:
        mesh, placements = tensor.device_mesh, tensor.placements
        if around is not None and len({*get_process_group_ranks(around)} & {*mesh.mesh.flatten().tolist()}) > 1:
            around = None  # ranks of one mesh hold different blocks, whatever is said of the model
        if partial := [placement for placement in placements if placement.is_partial()]:
            raise ValueError(f"{names[0]!r} is placed {partial}: a sum still to be made is not a weight to average")
        alike = [dim for dim, at in enumerate(placements) if at.is_replicate() and mesh.size(dim) > 1]
        shard = MeshShard(
            names,
            local_of(tensor),
            tensor,
            mesh=mesh,
            placements=placements,
            shape=tensor.shape,
            stride=tensor.stride(),
            replicas=mesh.get_group(alike[0]) if alike else around,
        )
        # A strided placement (FSDP2 over TP) already orders its dimensions in its own way: such a block stays whole.
        simple = all(type(placement) in (Rows, Replicate) for placement in placements)
        if alike and split and simple and splits_by_rows(shard.local):
            others = [dim for dim in range(mesh.ndim) if dim != alike[0]]
            turned = self._turned(mesh, [*others, alike[0]])
            shard.part = split_rows(shard, turned, [placements[dim] for dim in others], tensor.stride())
        return shard

    def _turned(self, mesh: DeviceMesh, order: list[int]) -> DeviceMesh:
        """The same mesh with its dimensions in another order."""
        if order == list(range(mesh.ndim)):
            return mesh
        key = mesh, tuple(order)
        if key not in self._meshes:
            self._meshes[key] = on_groups_of(mesh, order, mesh.device_type)
        return self._meshes[key]
