"""Optimizers as checkpoints hold them: by the names of the parameters, cut as these are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ema_dist.checkpoint.dcp.contents import Contents
from ema_dist.checkpoint.entries import Entry, FreshTensors, Target
from ema_dist.checkpoint.values import Path, flattened, storable
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
        everything: dict[int, list[Shard]] = {}
        for layout in sorted(layouts, key=lambda it: len(it.parameters)):  # a model goes before a part of it
            of_layout: dict[int, list[Shard]] = {}
            for shard in layout.parameters.values():
                of_layout.setdefault(id(shard.owner), []).append(shard)
            everything |= of_layout
        self._shards = {id(p): everything[id(p)] for p in self._parameters() if id(p) in everything}
        if unknown := [p.shape for p in self._parameters() if id(p) not in everything]:
            raise ValueError(
                f"it steps {len(unknown)} parameters (of shapes {[*map(tuple, unknown[:5])]}) that no module beside it "
                'holds: pass the model as well, {"model": model, "optim": optimizer}'
            )
        names = Counter(shard.name for shards in self._shards.values() for shard in shards)
        if double := [name for name, count in names.items() if count > 1]:
            raise ValueError(
                f"it steps several models with parameters called {double}: give each an optimizer of its own"
            )
        self._moments: dict[int, dict[str, Tensor]] = {owner: {} for owner in self._shards}
        self._targets: list[Target] = []
        self._rest: FreshTensors | None = None

    def saved(self) -> dict[str, Any]:
        state: dict[str, dict[str, Any]] = {}
        for parameter, values in self._optimizer.state.items():
            for shard in self._shards[id(parameter)]:
                state[shard.name] = {key: self._cut(shard, key, value) for key, value in values.items()}
        groups = [{**group, "params": names} for group, names in self._groups()]
        return {"state": state, "param_groups": storable(groups, f"{self.key}.param_groups")}

    def targets(self, contents: Contents) -> dict[str, Tensor]:
        shards = {shard.name: shard for of_owner in self._shards.values() for shard in of_owner}
        stored = contents.of(self.key)
        self._refuse_other_groups(contents, stored)
        rest: dict[Path, str] = {}
        targets: dict[str, Tensor] = {}
        for path, name in stored.items():
            match path:
                case ("state", parameter, str(key)) if (
                    (shard := shards.get(str(parameter)))
                    and name in contents.tensors
                    and contents.shape(name) == shard.shape
                    and (shard.shape or key != "step")
                ):
                    self._targets.append(Target.of(shard, self._moment(shard, key, contents.dtype(name))))
                    targets[name] = self._targets[-1].wrapped
                case _:
                    rest[path] = name
        self._rest = FreshTensors(rest, contents, {})
        return targets | self._rest.tensors

    def take(self, contents: Contents) -> None:
        assert self._rest is not None, "targets() comes first"
        for target in self._targets:
            target.finish()
        read = self._rest.value(contents)
        numbers = {id(p): number for number, p in enumerate(self._parameters())}
        state: dict[int, dict[str, Any]] = {}
        for owner, shards in self._shards.items():
            if values := {**read.get("state", {}).get(shards[0].name, {}), **self._moments[owner]}:
                state[numbers[owner]] = values
        groups = [
            {**group, "params": [numbers[id(p)] for p in mine["params"]]}
            for group, mine in zip(read["param_groups"], self._optimizer.param_groups, strict=True)
        ]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter in self._parameters():  # torch has cast the moments to the dtype of their parameter
            if moments := self._moments[id(parameter)]:
                self._optimizer.state[parameter].update(moments)

    def _cut(self, shard: Shard, key: str, value: Any) -> Any:
        part = shard.beside(value) if isinstance(value, Tensor) else None
        if part is not None:
            return shard.wrap(part)
        tensors = [leaf for leaf in flattened(value).values() if isinstance(leaf, Tensor)]
        if shard.ranks and any(tensor.dim() for tensor in tensors):
            raise ValueError(
                f"{key!r} of {shard.name!r} is not cut as the parameter is, and other ranks hold other parts: only "
                "states of the parameter's own shape and scalars can be saved; get_optimizer_state_dict may know how"
            )
        return storable(value, f"{self.key}.state.{shard.name}.{key}")

    def _moment(self, shard: Shard, key: str, dtype: torch.dtype) -> Tensor:
        """This rank's part of a state of the owner of ``shard``, of which there is one for all tensors in the owner."""
        moments = self._moments[id(shard.owner)]
        if key not in moments:
            present = self._optimizer.state.get(shard.owner, {}).get(key)
            fits = isinstance(present, Tensor) and (present.shape, present.dtype) == (shard.owner.shape, dtype)
            moments[key] = present if fits else torch.zeros_like(shard.owner.detach(), dtype=dtype)
        part = shard.beside(moments[key])
        assert part is not None, f"{key} was made like the parameter {shard.name}"
        return part

    def _refuse_other_groups(self, contents: Contents, stored: dict[Path, str]) -> None:
        mine = [names for _, names in self._groups()]
        saved = {
            path[1]: name for path, name in stored.items() if path[0] == "param_groups" and path[2:] == ("params",)
        }
        theirs = [contents.scalars[saved[index]] for index in sorted(saved, key=int)]
        # A flat parameter holds its tensors in an order of its own.
        if [*map(sorted, mine)] != [*map(sorted, theirs)]:
            raise ValueError(f"its parameter groups are others: expected {mine}, the checkpoint has {theirs}")

    def _groups(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        for group in self._optimizer.param_groups:
            yield group, [shard.name for p in group["params"] for shard in self._shards[id(p)]]

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self._optimizer.param_groups for p in group["params"])
