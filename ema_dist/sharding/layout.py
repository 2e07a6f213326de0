"""A model read into shards."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ema_dist.sharding import fsdp1
from ema_dist.sharding.change_detector import ChangeDetector
from ema_dist.sharding.discovery import ReplicaPolicy, find_tensors
from ema_dist.sharding.fsdp2 import FSDP2Units
from ema_dist.sharding.memory import distinct_elements, expanded_dims, find_shared_memory, memory_key
from ema_dist.sharding.mesh_shard import local_tensor
from ema_dist.sharding.rank_sets import RankSet, group_ranks
from ema_dist.sharding.registries import RegistryEntry, replace_inference_buffers, resolve_live
from ema_dist.sharding.shard import Shard


class Layout:
    """The tensors of one model as this rank holds them, in the order of the unwrapped model's ``state_dict()``.

    Args:
        model: plain, or wrapped as a whole or in parts in any way `ema_dist` knows.
        replicas: ``"shard"`` splits averages among replicas that hold identical weights; ``"copy"`` does not. A process
            group means ``"shard"`` for an unwrapped model that is replicated over the group.

    Raises: ValueError for a model on the meta device; RuntimeError if torch lacks an attribute of FSDP1 that is read.
    """

    def __init__(self, model: nn.Module, replicas: ReplicaPolicy = "shard") -> None:
        self.model = model
        self._replicas: ReplicaPolicy = replicas
        replace_inference_buffers(model)
        self.fsdp2_units: FSDP2Units = FSDP2Units(model)
        """The parts of the model that FSDP2 shards."""
        # Found once: finding them again at each swap and serving would visit all modules.
        self._flat_handles = [handle for _, handle in fsdp1.handles(model)]
        self.reshard()
        self.shards: list[Shard] = []
        """Parameters and buffers, in the order of their first names in ``state_dict()``."""
        self.parameters: dict[str, Shard] = {}
        self.buffers: dict[str, Shard] = {}
        self.registry_entries: dict[str, list[RegistryEntry]] = {}
        """The registry entries that hold each tensor, by its first name; none for tensors that FSDP1 has flattened."""
        tensors, extra_states = find_tensors(model, replicas, self.fsdp2_units)
        self.extra_states: dict[str, nn.Module] = extra_states
        for tensor in tensors:
            shard = tensor.make_shard(self.fsdp2_units)
            if shard.local.is_meta:
                raise ValueError(
                    f"{shard.name!r} is on the meta device: give it memory first, as with model.to_empty(device=...)"
                )
            shard.padded_numel = self.fsdp2_units.padded_numel(shard.owner) or shard.padded_numel
            self.shards.append(shard)
            self.registry_entries[shard.name] = tensor.registry_entries
            (self.buffers if tensor.is_buffer else self.parameters)[shard.name] = shard
        self._change_detector = ChangeDetector(
            model, [entry for name in self.parameters for entry in self.registry_entries[name]]
        )

    @cached_property
    def ranks(self) -> list[int]:
        """The global ranks that hold this model together, in order; empty when this rank holds it alone."""
        # Distinct pairs first: a union of thousands of ranks for each tensor is slow.
        pairs = {(shard.gather_ranks, shard.averaged_part.gather_ranks) for shard in self.shards}
        rank_sets = {whole | part for whole, part in pairs}
        rank_sets |= {group_ranks(s.replica_group).as_set for s in self.shards if s.replica_group is not None}
        union = frozenset[int]().union(*rank_sets)
        # If no set contains all others (DDP over TP, HYBRID_SHARD), ranks that this rank does not know of may be
        # missing, so all ranks are taken.
        return sorted(union) if not union or union in rank_sets else list(range(dist.get_world_size()))

    @cached_property
    def group(self) -> ProcessGroup | None:
        """The process group of exactly `ranks`; None for a model that this rank holds alone.

        Raises: RuntimeError when the model is spread over ranks that have no group of their own.
        """
        if not self.ranks:
            return None
        groups = [
            dist.group.WORLD,
            *(g for s in self.shards for g in (s.averaged_part.gather_group, s.gather_group, s.replica_group)),
        ]
        for group in dict.fromkeys(groups):
            if group is not None and [*group_ranks(group).ranks] == self.ranks:
                return group
        ranks = RankSet(tuple(self.ranks), (len(self.ranks),))
        raise RuntimeError(
            f"the model is spread over ranks {ranks.text}, but no process group of the model has exactly these ranks: "
            "spread the model over all ranks"
        )

    @property
    def summary(self) -> str:
        """How the tensors are sharded, for messages: each layout once, with its number of tensors."""
        counts = Counter(shard.summary for shard in self.shards)
        return "; ".join(f"{count} tensors {text}" for text, count in counts.items())

    @property
    def ties(self) -> dict[str, str]:
        """The other names of tied tensors, each mapped to the first name."""
        return {name: shard.name for shard in self.shards for name in shard.names[1:]}

    def ties_missing_in(self, other: Layout) -> list[str]:
        """The groups of names that are one tensor here and several in ``other``, which has the same names."""
        others = other.shards_by_name()
        return [" and ".join(s.names) for s in self.shards if len({others[name].name for name in s.names}) > 1]

    def require_writable(self) -> None:
        """Raise ValueError if averages cannot be swapped into the model and out of it again.

        Tensors that share a part of their memory would overwrite each other, and parameters that were made in
        ``torch.inference_mode()`` cannot be written to outside of it.
        """
        for name, shard in self.parameters.items():
            if shard.owner.is_inference():
                raise ValueError(
                    f"{name!r} was made in torch.inference_mode(), and can neither be trained nor swapped: construct "
                    "the model outside of it"
                )
        # Tensors in a flat parameter of FSDP1 are disjoint; they alone have no registry entries.
        owned = [shard for shard in self.shards if self.registry_entries[shard.name]]
        if problem := find_shared_memory((shard.name, shard.owner) for shard in owned):
            raise ValueError(problem)

    def shares_modules_with(self, model: nn.Module) -> bool:
        """Whether ``model`` shares a module or a parameter with this model; one may contain the other."""
        own_ids = {*map(id, self.model.modules()), *map(id, self.model.parameters())}
        return not own_ids.isdisjoint(map(id, chain(model.modules(), model.parameters())))

    def shards_by_name(self) -> dict[str, Shard]:
        """Parameters and buffers under all of their names, including those of tied tensors."""
        return {name: shard for shard in self.shards for name in shard.names}

    def reshard(self) -> None:
        """Drop weights that a forward pass left gathered, so that the next pass gathers the current shards."""
        self.fsdp2_units.clear_optim_events()
        self.fsdp2_units.reshard()
        fsdp1.reshard(self._flat_handles)

    def wait_for_device(self) -> None:
        """Wait for devices that may still copy weights from CPU memory; call it before writing to these weights.

        FSDP copies offloaded weights to the device asynchronously. A write by the host would overtake such a copy, and
        the forward pass that was queued would compute with the new values. Does nothing for weights on the device.
        """
        offloaded = (shard for shard in self.shards if shard.local.device.type == "cpu")
        devices = {device for shard in offloaded if (device := shard.communication_device).type != "cpu"}
        for device in devices | fsdp1.offloaded_devices(self._flat_handles):
            torch.accelerator.synchronize(device)

    def abandon_pass(self) -> None:
        """Reset the wrappers after an exception ended a forward or backward pass, and drop what it left gathered."""
        self.fsdp2_units.abandon_pass()

    def describe_changes(self, other: Layout) -> dict[str, tuple[str, str]]:
        """The tensors whose shape, sharding, device or ties differ in ``other``: both descriptions, by name."""
        here, there = self.shards_by_name(), other.shards_by_name()
        differing = sorted(
            name
            for name in here.keys() | there.keys()
            if name not in here or name not in there or _identity(here[name]) != _identity(there[name])
        )
        return {name: (_description(name, here.get(name)), _description(name, there.get(name))) for name in differing}

    def has_moved(self) -> bool:
        """Whether live weights have other storage than the shards (``.to()``, ``assign=True``, offloading)."""
        return self._change_detector.has_changed()

    def is_current(self, *, init_fsdp2: bool = False) -> bool:
        """Whether the layout still describes the model, after dropping gathered weights; always False under FSDP1.

        Args:
            init_fsdp2: first let FSDP2 run the initialization of its first forward pass, which may move its shards.
        """
        if self.has_flat_parameters:
            return False
        if init_fsdp2:
            self.fsdp2_units.init_and_reshard()
        else:
            self.reshard()
        return not (self.has_moved() or self._change_detector.has_replaced_params() or self._replaced_buffers())

    def reread(self) -> Layout:
        """The model as it is now, read in the same way. Raises: as the constructor."""
        return Layout(self.model, self._replicas)

    def is_same_reading(self, other: Layout) -> bool:
        """Whether ``other``, with the same names, was read from the same objects, which view the same memory."""
        return self.extra_states == other.extra_states and all(
            ours.owner is theirs.owner and _view_key(ours.local) == _view_key(theirs.local)
            for ours, theirs in zip(self.shards, other.shards, strict=True)
        )

    def has_moved_parameters(self) -> bool:
        """Whether a registered parameter has other storage than its shard; ignores flat parameters of FSDP1."""
        current = (
            (entry.registry.get(entry.name), shard)
            for name, shard in self.parameters.items()
            for entry in self.registry_entries[name]
        )
        return any(
            isinstance(value, Tensor) and local_tensor(resolve_live(value)).data_ptr() != shard.local.data_ptr()
            for value, shard in current
        )

    @property
    def has_flat_parameters(self) -> bool:
        """Whether FSDP1 has flattened any of the tensors."""
        return self._change_detector.has_flat_parameters

    def refresh_buffers(self) -> bool:
        """Use the buffers that are registered now; modules may replace buffers. Returns: whether any was replaced."""
        replaced = self._replaced_buffers()
        for shard, buffers in replaced:
            (shard.owner_name, shard.owner), *others = buffers.items()
            shard.other_owners = dict(others)
            shard.local = distinct_elements(local_tensor(shard.owner), expanded_dims(shard.owner))
        return bool(replaced)

    def _replaced_buffers(self) -> list[tuple[Shard, dict[str, Tensor]]]:
        """The shards of buffers that modules have replaced, each with its new owners by name.

        Raises: ValueError when a buffer has another shape, or tied buffers are no longer one tensor.
        """
        replaced: list[tuple[Shard, dict[str, Tensor]]] = []
        for name, shard in self.buffers.items():
            entries = self.registry_entries[name]
            buffers = [_current_buffer(entry) for entry in entries]
            is_same = (
                buffers[0] is shard.owner
                if len(buffers) == 1
                else {*map(id, buffers)} == {*map(id, shard.owners.values())}
            )
            if is_same and _storage_key(shard.owner) == _storage_key(shard.local):
                continue
            replace_inference_buffers(self.model)
            buffers = [_current_buffer(entry) for entry in entries]
            owners: dict[int, tuple[str, Tensor]] = {}
            for own_name, buffer in zip(shard.names, buffers, strict=True):
                if buffer is None or buffer.shape != shard.shape or expanded_dims(buffer) != expanded_dims(shard.owner):
                    now = "is None" if buffer is None else f"has {_describe_shape(buffer)}"
                    raise ValueError(
                        f"buffer {own_name!r} had the shape {_describe_shape(shard.owner)} and now {now}: "
                        "construct ShardedEMA again after such a change"
                    )
                owners.setdefault(id(buffer), (own_name, buffer))
            if len({memory_key(buffer) for _, buffer in owners.values()}) > 1:
                raise ValueError(
                    f"the buffers {[*shard.names]} were one tensor, but a module has replaced one of them: register "
                    "one tensor under all of these names again, or construct ShardedEMA again"
                )
            replaced.append((shard, dict(owners.values())))
        return replaced


def _identity(shard: Shard) -> tuple[object, ...]:
    """What must not change while there are averages: shape, sharding, device and ties."""
    return shard.averaged_part.sharding_key(), shard.local.device, {*shard.names}


def _description(name: str, shard: Shard | None) -> str:
    if shard is None:
        return "absent"
    tied = f", tied to {sorted({*shard.names} - {name})}" if len(shard.names) > 1 else ""
    return f"{shard.averaged_part.sharding_text} on {shard.local.device}{tied}"


def _current_buffer(entry: RegistryEntry) -> Tensor | None:
    buffer = entry.registry.get(entry.name)
    return None if buffer is None else resolve_live(buffer)


def _describe_shape(buffer: Tensor) -> str:
    dims = expanded_dims(buffer)
    return f"{tuple(buffer.shape)}{f', expanded along dimensions {[*dims]}' if dims else ''}"


def _view_key(local: Tensor) -> tuple[object, ...]:
    return local.data_ptr(), local.dtype, local.shape, local.stride()


def _storage_key(tensor: Tensor) -> tuple[object, ...]:
    local = local_tensor(tensor)
    return local.data_ptr(), local.dtype
