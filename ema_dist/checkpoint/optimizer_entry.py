"""Optimizers in checkpoints: their states by parameter name, sharded as the parameters are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ema_dist.checkpoint.dcp.contents import Contents
from ema_dist.checkpoint.entries import Entry, RebuiltValue, Target
from ema_dist.checkpoint.optimizer_wrappers import saved_optimizer
from ema_dist.checkpoint.values import KeyPath, flatten, pack_value, require_plain_tensor
from ema_dist.messages import abbreviated, describe_difference
from ema_dist.sharding import Layout, Shard, is_sharded


class OwnedShard(NamedTuple):
    """A shard under one of its names, and the tensor that an optimizer steps; in FSDP1 that holds several shards."""

    name: str
    owner: Tensor
    shard: Shard


class OptimizerEntry(Entry):
    """An optimizer under the names of ``get_optimizer_state_dict``: ``state.<name>.<key>`` and ``param_groups``.

    States of the parameter's shape, such as moments, are sharded as the parameter; others must be equal on all ranks.

    Args:
        layouts: of the models whose parameters the optimizer steps.
        saved_beside: the optimizers that are saved under keys of their own.

    Raises: ValueError when it steps a parameter that is in none of the models, or several parameters of one name; and
        as `saved_optimizer`.
    """

    def __init__(
        self, key: str, optimizer: Optimizer, layouts: Iterable[Layout], saved_beside: Iterable[Optimizer] = ()
    ) -> None:
        super().__init__(key)
        self._optimizer = saved_optimizer(optimizer, key, saved_beside)
        shards_by_owner: dict[int, list[OwnedShard]] = {}
        for layout in sorted(
            layouts, key=lambda layout: len(layout.parameters)
        ):  # a whole model overrides its submodules
            layout_shards: dict[int, list[OwnedShard]] = {}
            for shard in layout.parameters.values():
                for name, owner in shard.owners.items():
                    layout_shards.setdefault(id(owner), []).append(OwnedShard(name, owner, shard))
            shards_by_owner |= layout_shards
        self._shards = {id(p): shards_by_owner[id(p)] for p in self._parameters() if id(p) in shards_by_owner}
        if unknown := [p.shape for p in self._parameters() if id(p) not in shards_by_owner]:
            raise ValueError(
                f"it steps {len(unknown)} parameters (of shapes {[*map(tuple, unknown[:5])]}) that are in no module of "
                'the dictionary: pass the model as well, {"model": model, "optim": optimizer}'
            )
        names = Counter(owned.name for shards in self._shards.values() for owned in shards)
        if duplicates := [name for name, count in names.items() if count > 1]:
            raise ValueError(
                f"it steps several models with parameters called {abbreviated(duplicates)}: give each its own optimizer"
            )
        self._moments: dict[int, dict[str, Tensor]] = {owner: {} for owner in self._shards}
        self._targets: list[Target] = []
        self._other_state: RebuiltValue | None = None

    def state_to_save(self) -> dict[str, Any]:
        state: dict[str, dict[str, Any]] = {}
        for parameter, values in self._optimizer.state.items():
            for name, _, shard in self._shards[id(parameter)]:
                state[name] = {
                    key: self._wrap_state(shard, key, value)
                    for key, value in values.items()
                    if not (_has_none_of(shard) and _is_number(value))
                }
        groups = [{**group, "params": names} for group, names in self._groups()]
        return {"state": state, "param_groups": pack_value(groups, f"{self.key}.param_groups")}

    def numbers_of_sharded_parameters(self) -> dict[str, str]:
        """The numbers in the states and groups of sharded parameters, by name; as text, so that NaN equals NaN.

        Parameters of which this rank has no elements are left out: its optimizer may not have stepped them.
        """
        numbers: dict[str, Any] = {}
        for parameter, values in self._optimizer.state.items():
            for name, _, shard in self._shards[id(parameter)]:
                if shard.gather_ranks and not _has_none_of(shard):
                    numbers |= {f"{self.key}.state.{name}.{key}": value for key, value in values.items()}
        for index, group in enumerate(self._optimizer.param_groups):
            if any(owned.shard.gather_ranks for p in group["params"] for owned in self._shards[id(p)]):
                numbers |= {f"{self.key}.param_groups.{index}.{name}": value for name, value in group.items()}
        return {
            name: repr(value.item() if isinstance(value, Tensor) else value)
            for name, value in numbers.items()
            if _is_number(value)
        }

    def targets(self, contents: Contents) -> dict[str, Tensor]:
        shards = {owned.name: owned for owner_shards in self._shards.values() for owned in owner_shards}
        stored = contents.entry_names(self.key)
        self._require_same_groups(contents, stored)
        other_names: dict[KeyPath, str] = {}
        targets: dict[str, Tensor] = {}
        for path, name in stored.items():
            match path:
                case ("state", parameter, str(key)) if (
                    (owned := shards.get(str(parameter)))
                    and name in contents.tensors
                    and contents.shape(name) == owned.shard.shape
                    and (owned.shard.shape or key != "step")
                ):
                    moment = self._local_moment(owned, key, contents.dtype(name))
                    self._targets.append(Target.create(owned.shard, moment))
                    targets[name] = self._targets[-1].wrapped
                case _:
                    other_names[path] = name
        self._other_state = RebuiltValue(other_names, contents, {})
        return targets | self._other_state.tensors

    def finish_load(self, contents: Contents) -> None:
        assert self._other_state is not None, "targets() comes first"
        for target in self._targets:
            target.copy_back()
        restored = self._other_state.value(contents)
        numbers = {id(p): number for number, p in enumerate(self._parameters())}
        state: dict[int, dict[str, Any]] = {}
        for owner, shards in self._shards.items():
            if values := {**restored.get("state", {}).get(shards[0].name, {}), **self._moments[owner]}:
                state[numbers[owner]] = values
        groups = [
            {**group, "params": [numbers[id(p)] for p in current["params"]]}
            for group, current in zip(restored["param_groups"], self._optimizer.param_groups, strict=True)
        ]
        self._load_in_place({"state": state, "param_groups": groups})
        for parameter in self._parameters():  # load_state_dict casts moments to the parameter's dtype
            if moments := self._moments[id(parameter)]:
                self._optimizer.state[parameter].update(moments)

    def _load_in_place(self, state_dict: dict[str, Any]) -> None:
        """Load into the existing group and state dictionaries: wrappers and schedulers may hold references to them."""
        optimizer = self._optimizer
        state, groups = optimizer.state, optimizer.param_groups
        optimizer.load_state_dict(state_dict)
        for group, loaded in zip(groups, optimizer.param_groups, strict=True):
            group.clear()
            group.update(loaded)
        loaded_state = dict(optimizer.state)
        state.clear()
        state.update(loaded_state)
        optimizer.state, optimizer.param_groups = state, groups

    def _wrap_state(self, shard: Shard, key: str, value: Any) -> Any:
        part = None
        if isinstance(value, Tensor):
            part = shard.local_state(require_plain_tensor(value, f"{self.key}.state.{shard.name}.{key}"))
        if part is not None:
            return shard.wrap(part)
        tensors = [leaf for leaf in flatten(value).values() if isinstance(leaf, Tensor)]
        if shard.gather_ranks and any(tensor.dim() for tensor in tensors):
            raise ValueError(
                f"the state {key!r} of {shard.name!r} does not have the parameter's shape, so it is unknown which part "
                "of it each rank holds: only scalars and states of the parameter's shape can be saved; "
                "get_optimizer_state_dict may be able to save this optimizer"
            )
        return pack_value(value, f"{self.key}.state.{shard.name}.{key}")

    def _local_moment(self, owned: OwnedShard, key: str, dtype: torch.dtype) -> Tensor:
        """This rank's shard of a moment, which all shards of one owner (in FSDP1, a flat parameter) share."""
        name, owner, shard = owned
        moments = self._moments[id(owner)]
        if key not in moments:
            existing = self._optimizer.state.get(owner, {}).get(key)
            fits = isinstance(existing, Tensor) and (existing.shape, existing.dtype) == (owner.shape, dtype)
            moments[key] = existing if fits else torch.zeros_like(owner.detach(), dtype=dtype)
        part = shard.local_state(moments[key])
        assert part is not None, f"{key} was made like the parameter {name}"
        return part

    def _require_same_groups(self, contents: Contents, stored: dict[KeyPath, str]) -> None:
        expected = [names for _, names in self._groups()]
        names_by_group = {
            path[1]: name for path, name in stored.items() if path[0] == "param_groups" and path[2:] == ("params",)
        }
        saved = [contents.plain_values[names_by_group[index]] for index in sorted(names_by_group, key=int)]
        if len(expected) != len(saved):
            raise ValueError(f"it has {len(expected)} parameter groups, but the checkpoint has {len(saved)}")
        for index, (names, saved_names) in enumerate(zip(expected, saved, strict=True)):
            if different := describe_difference("the optimizer", {*names}, "the checkpoint", {*saved_names}):
                raise ValueError(f"the parameters of its group {index} differ: {different}")

    def _groups(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        for group in self._optimizer.param_groups:
            yield group, [owned.name for p in group["params"] for owned in self._shards[id(p)]]

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self._optimizer.param_groups for p in group["params"])


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return not value.dim() and not is_sharded(value)
    return isinstance(value, (bool, int, float))


def _has_none_of(shard: Shard) -> bool:
    """Whether only other ranks have elements of the parameter."""
    return bool(shard.gather_ranks) and not shard.local.numel() and bool(shard.shape.numel())
