"""Finds the tensors of a model: each once, with all of its names and a function that makes its shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FlatParameter

from ema_dist.sharding import fsdp1
from ema_dist.sharding.names import NamedModule, named_modules
from ema_dist.sharding.registries import RegistryEntry, resolve_live
from ema_dist.sharding.shard import Shard
from ema_dist.sharding.shard_factory import ShardFactory

ReplicaPolicy: TypeAlias = Literal["shard", "copy"] | ProcessGroup
"""How replicas store averages: ``"shard"`` or ``"copy"``; a process group holds the replicas of an unwrapped model."""


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of the model, with all of its names; the shard is made once the names are complete."""

    make_shard: Callable[[tuple[str, ...]], Shard]
    is_buffer: bool
    names: list[str] = field(default_factory=list)
    registry_entries: list[RegistryEntry] = field(default_factory=list)


def find_tensors(model: nn.Module, replicas: ReplicaPolicy) -> tuple[list[ModelTensor], dict[str, nn.Module]]:
    """All entries of the unwrapped model's ``state_dict()``: its tensors, and modules with an extra state by name."""
    flat_by_module = fsdp1.flat_tensors(model)
    factory = ShardFactory(model, split=replicas != "copy")
    tensors_by_key: dict[object, ModelTensor] = {}
    extra_states = {}
    for parent in named_modules(
        NamedModule(model, replica_group=replicas if isinstance(replicas, ProcessGroup) else None)
    ):
        module, module_flat_tensors = parent.module, flat_by_module.get(id(parent.module), {})
        for name, flat_tensor in module_flat_tensors.items():
            tensor = tensors_by_key.setdefault(flat_tensor.key, ModelTensor(flat_tensor.make_shard, is_buffer=False))
            tensor.names.append(parent.prefix + name)
        for is_buffer, registry, name, registered in _registered_tensors(module):
            if name in module_flat_tensors:
                continue
            value = resolve_live(registered)
            if getattr(value, "_fsdp_flattened", False):  # FSDP1 sets it on views of a flat parameter
                raise ValueError(
                    f"{parent.prefix + name!r} is a piece of a flat parameter of FSDP1, which is wrapped around this "
                    "module: pass the FullyShardedDataParallel module itself"
                )
            tensor = tensors_by_key.setdefault(
                id(value), ModelTensor(factory.shard_maker(value, parent, is_buffer=is_buffer), is_buffer)
            )
            tensor.names.append(parent.prefix + name)
            tensor.registry_entries.append(RegistryEntry(module, registry, name))
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            extra_states[f"{parent.prefix}_extra_state"] = module
    return list(tensors_by_key.values()), extra_states


def _registered_tensors(module: nn.Module) -> Iterator[tuple[bool, dict[str, Any], str, Tensor]]:
    # named_parameters() and named_buffers() do not tell which buffers are persistent, nor give the registries, in which
    # Layout looks up tensors later.
    for name, parameter in module._parameters.items():
        if parameter is not None and not isinstance(parameter, FlatParameter):
            yield False, module._parameters, name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield True, module._buffers, name, buffer
