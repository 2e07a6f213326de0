"""Finds the tensors of a model: each once, with all of its names and a function that makes its shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FlatParameter

from ema_dist.sharding import fsdp1
from ema_dist.sharding.fsdp2 import FSDP2Units
from ema_dist.sharding.memory import distinct_elements, expanded_dims, memory_key
from ema_dist.sharding.names import NamedModule, named_modules
from ema_dist.sharding.plain_shard import ExpandedShard
from ema_dist.sharding.registries import RegistryEntry, resolve_live
from ema_dist.sharding.shard import Shard
from ema_dist.sharding.shard_factory import ShardFactory

ReplicaPolicy: TypeAlias = Literal["shard", "copy"] | ProcessGroup
"""How replicas store averages: ``"shard"``, ``"copy"``, or the process group of the replicas of an unwrapped model."""


@dataclass(frozen=True)
class Owner:
    """A tensor object that modules hold, under its first name; `make_shard` takes all names."""

    name: str
    tensor: Tensor | None
    """None for a tensor that FSDP1 has flattened."""
    make_shard: Callable[[tuple[str, ...]], Shard]
    is_buffer: bool = False


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of the model, with all of its names; the shard is made once the names are complete."""

    owners: dict[int, Owner] = field(default_factory=dict)
    """The objects by id: one, or several that share all of their memory."""
    names: list[str] = field(default_factory=list)
    registry_entries: list[RegistryEntry] = field(default_factory=list)

    @property
    def is_buffer(self) -> bool:
        """Whether no parameter shares this memory."""
        return all(owner.is_buffer for owner in self.owners.values())

    def make_shard(self, fsdp2_units: FSDP2Units) -> Shard:
        """The shard, made from the owner that FSDP2 gathers or that the optimizer writes to, if there is one."""
        gathered_ids = fsdp2_units.fsdp_param_by_id
        # FSDP2 gathers the parameters that it knows, and an optimizer writes to those that require a gradient.
        owner, *others = sorted(
            self.owners.values(),
            key=lambda owner: (owner.is_buffer, id(owner.tensor) not in gathered_ids, not _requires_grad(owner.tensor)),
        )
        shard = owner.make_shard(tuple(self.names))
        shard.owner_name = owner.name
        shard.other_owners = {other.name: other.tensor for other in others if other.tensor is not None}
        return shard


def find_tensors(
    model: nn.Module, replicas: ReplicaPolicy, fsdp2_units: FSDP2Units
) -> tuple[list[ModelTensor], dict[str, nn.Module]]:
    """All entries of the unwrapped model's ``state_dict()``: its tensors, and modules with an extra state by name.

    Parameters and buffers that share all of their memory are one tensor with several names: `memory_key` decides.
    """
    flat_by_module = fsdp1.flat_tensors(model)
    factory = ShardFactory(model, split=replicas != "copy")
    tensors_by_key: dict[object, ModelTensor] = {}
    extra_states = {}
    for parent in named_modules(
        NamedModule(model, replica_group=replicas if isinstance(replicas, ProcessGroup) else None)
    ):
        module, module_flat_tensors = parent.module, flat_by_module.get(id(parent.module), {})
        for name, flat_tensor in module_flat_tensors.items():
            tensor = tensors_by_key.setdefault(flat_tensor.key, ModelTensor())
            tensor.owners.setdefault(0, Owner(parent.prefix + name, None, flat_tensor.make_shard))
            tensor.names.append(parent.prefix + name)
        for is_buffer, registry, name, registered in _registered_tensors(module):
            if name in module_flat_tensors:
                continue
            value = resolve_live(registered)
            if getattr(value, "_fsdp_flattened", False):  # FSDP1 sets it on views of a flat parameter
                raise ValueError(
                    f"{parent.prefix + name!r} is a part of a flat parameter of an FSDP1 module that contains this "
                    "module: pass that FullyShardedDataParallel module instead"
                )
            if hasattr(value, "ds_id"):  # DeepSpeed sets it on parameters that ZeRO-3 partitions
                raise ValueError(
                    f"{parent.prefix + name!r} is partitioned by DeepSpeed ZeRO-3, and has no elements between forward "
                    "passes: use ZeRO stage 1 or 2, or shard the model with fully_shard()"
                )
            first = None if is_buffer else fsdp2_units.first_parameter(module, name)
            key = memory_key(value if first is None else first)
            tensor = tensors_by_key.setdefault(key, ModelTensor())
            if id(value) not in tensor.owners:
                make_shard = (
                    _expanded_shard_maker(value)
                    if expanded_dims(value)
                    else factory.shard_maker(value, parent, is_buffer=is_buffer)
                )
                tensor.owners[id(value)] = Owner(parent.prefix + name, value, make_shard, is_buffer)
            tensor.names.append(parent.prefix + name)
            tensor.registry_entries.append(RegistryEntry(module, registry, name))
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            extra_states[f"{parent.prefix}_extra_state"] = module
    return list(tensors_by_key.values()), extra_states


def _registered_tensors(module: nn.Module) -> Iterator[tuple[bool, dict[str, Any], str, Tensor]]:
    # named_parameters() and named_buffers() return neither which buffers are persistent nor the registries, in which
    # Layout looks up tensors later.
    for name, parameter in module._parameters.items():
        if parameter is not None and not isinstance(parameter, FlatParameter):
            yield False, module._parameters, name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield True, module._buffers, name, buffer


def _expanded_shard_maker(value: Tensor) -> Callable[[tuple[str, ...]], Shard]:
    dims = expanded_dims(value)
    return lambda names: ExpandedShard(names, distinct_elements(value.detach(), dims), value, dims=dims)


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
