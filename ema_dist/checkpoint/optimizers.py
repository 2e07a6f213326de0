"""Optimizers as checkpoints hold them: by the names of the parameters, cut as these are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ema_dist.checkpoint.dcp.contents import Contents
from ema_dist.checkpoint.entries import Entry, RebuiltValue, Target
from ema_dist.checkpoint.values import KeyPath, flatten, pack_value
from ema_dist.sharding import Layout, Shard


class OptimizerEntry(Entry):
    """An optimizer, laid out as ``get_optimizer_state_dict`` lays it out: ``state.<name>.<key>`` and ``param_groups``.

    A moment, or whatever has the parameter's shape, is cut as the parameter; all else must be the same on every rank.

    Args:
        layouts: of the models whose parameters it steps.

    Raises: ValueError when it steps a parameter that none of them holds, or several of one name.
    """

    def __init__(self, key: str, optimizer: Optimizer, layouts: Iterable[Layout]) -> None:
        super().__init__(key)
        self._optimizer = optimizer
        shards_by_owner: dict[int, list[Shard]] = {}
        for layout in sorted(layouts, key=lambda layout: len(layout.parameters)):  # a model goes before a part of it
            layout_shards: dict[int, list[Shard]] = {}
            for shard in layout.parameters.values():
                layout_shards.setdefault(id(shard.owner), []).append(shard)
            shards_by_owner |= layout_shards
        self._shards = {id(p): shards_by_owner[id(p)] for p in self._parameters() if id(p) in shards_by_owner}
        if unknown := [p.shape for p in self._parameters() if id(p) not in shards_by_owner]:
            raise ValueError(
                f"it steps {len(unknown)} parameters (of shapes {[*map(tuple, unknown[:5])]}) that no module beside it "
                'holds: pass the model as well, {"model": model, "optim": optimizer}'
            )
        names = Counter(shard.name for shards in self._shards.values() for shard in shards)
        if duplicates := [name for name, count in names.items() if count > 1]:
            raise ValueError(
                f"it steps several models with parameters called {duplicates}: give each an optimizer of its own"
            )
        self._moments: dict[int, dict[str, Tensor]] = {owner: {} for owner in self._shards}
        self._targets: list[Target] = []
        self._others: RebuiltValue | None = None

    def state_to_save(self) -> dict[str, Any]:
        state: dict[str, dict[str, Any]] = {}
        for parameter, values in self._optimizer.state.items():
            for shard in self._shards[id(parameter)]:
                state[shard.name] = {key: self._wrap_state(shard, key, value) for key, value in values.items()}
        groups = [{**group, "params": names} for group, names in self._groups()]
        return {"state": state, "param_groups": pack_value(groups, f"{self.key}.param_groups")}

    def targets(self, contents: Contents) -> dict[str, Tensor]:
        shards = {shard.name: shard for owner_shards in self._shards.values() for shard in owner_shards}
        stored = contents.entry_names(self.key)
        self._require_same_groups(contents, stored)
        other_names: dict[KeyPath, str] = {}
        targets: dict[str, Tensor] = {}
        for path, name in stored.items():
            match path:
                case ("state", parameter, str(key)) if (
                    (shard := shards.get(str(parameter)))
                    and name in contents.tensors
                    and contents.shape(name) == shard.shape
                    and (shard.shape or key != "step")
                ):
                    self._targets.append(Target.create(shard, self._moment(shard, key, contents.dtype(name))))
                    targets[name] = self._targets[-1].wrapped
                case _:
                    other_names[path] = name
        self._others = RebuiltValue(other_names, contents, {})
        return targets | self._others.tensors

    def finish_load(self, contents: Contents) -> None:
        assert self._others is not None, "targets() comes first"
        for target in self._targets:
            target.copy_back()
        restored = self._others.value(contents)
        numbers = {id(p): number for number, p in enumerate(self._parameters())}
        state: dict[int, dict[str, Any]] = {}
        for owner, shards in self._shards.items():
            if values := {**restored.get("state", {}).get(shards[0].name, {}), **self._moments[owner]}:
                state[numbers[owner]] = values
        groups = [
            {**group, "params": [numbers[id(p)] for p in mine["params"]]}
            for group, mine in zip(restored["param_groups"], self._optimizer.param_groups, strict=True)
        ]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter in self._parameters():  # torch has cast the moments to the dtype of their parameter
            if moments := self._moments[id(parameter)]:
                self._optimizer.state[parameter].update(moments)

    def _wrap_state(self, shard: Shard, key: str, value: Any) -> Any:
        part = shard.local_state(value) if isinstance(value, Tensor) else None
        if part is not None:
            return shard.wrap(part)
        tensors = [leaf for leaf in flatten(value).values() if isinstance(leaf, Tensor)]
        if shard.ranks and any(tensor.dim() for tensor in tensors):
            raise ValueError(
                f"{key!r} of {shard.name!r} is not cut as the parameter is, and other ranks hold other parts: only "
                "states of the parameter's own shape and scalars can be saved; get_optimizer_state_dict may know how"
            )
        return pack_value(value, f"{self.key}.state.{shard.name}.{key}")

    def _moment(self, shard: Shard, key: str, dtype: torch.dtype) -> Tensor:
        """This rank's part of a state of the owner of ``shard``, of which there is one for all tensors in the owner."""
        moments = self._moments[id(shard.owner)]
        if key not in moments:
            existing = self._optimizer.state.get(shard.owner, {}).get(key)
            fits = isinstance(existing, Tensor) and (existing.shape, existing.dtype) == (shard.owner.shape, dtype)
            moments[key] = existing if fits else torch.zeros_like(shard.owner.detach(), dtype=dtype)
        part = shard.local_state(moments[key])
        assert part is not None, f"{key} was made like the parameter {shard.name}"
        return part

    def _require_same_groups(self, contents: Contents, stored: dict[KeyPath, str]) -> None:
        mine = [names for _, names in self._groups()]
        saved = {
            path[1]: name for path, name in stored.items() if path[0] == "param_groups" and path[2:] == ("params",)
        }
        theirs = [contents.plain_values[saved[index]] for index in sorted(saved, key=int)]
        # A flat parameter holds its tensors in an order of its own.
        if [*map(sorted, mine)] != [*map(sorted, theirs)]:
            raise ValueError(f"its parameter groups are others: expected {mine}, the checkpoint has {theirs}")

    def _groups(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        for group in self._optimizer.param_groups:
            yield group, [shard.name for p in group["params"] for shard in self._shards[id(p)]]

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self._optimizer.param_groups for p in group["params"])
