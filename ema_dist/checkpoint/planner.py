"""A DCP planner that reuses the plan of the save before it, if every rank saves the same names, shapes and cuts."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItemType

_plan_numbers = count(1)


@dataclass(frozen=True)
class _FinishedPlan:
    """One plan of all ranks, as this rank knows it.

    Args:
        requested: what this rank asked to write.
        assigned: what the first rank told this rank to write.
        number: of the plan, the same on all ranks.
        metadata: of the whole checkpoint; only on the first rank.
    """

    requested: SavePlan
    assigned: SavePlan
    number: int
    metadata: Metadata | None


_last_plans: MutableMapping[ProcessGroup, _FinishedPlan] = WeakKeyDictionary()
"""The plan of the last save over each group; it is of no use to another group, because it names ranks of its own."""


class SavePlanner(DefaultSavePlanner):
    """Plans to save ``state_dict`` as torch does, or reuses the plan of the last save over ``group``.

    torch gathers the plans of all ranks on the first one, which merges, validates and scatters them. That takes longer
    with every rank and tensor, and gives the same result for every save of a run. At the end, torch sends the metadata
    of the whole checkpoint to every rank, which takes longer still: here it stays on the first one, as
    `global_metadata`.

    Between the constructor and ``dcp.save``, every rank calls `reuse_last_plan`.

    Memory: the last plan of each group stays: some hundred bytes for each tensor that this rank writes, and on the
        first rank the metadata of the checkpoint.
    Raises: what torch raises when it cannot plan a value of ``state_dict``.
    """

    def __init__(self, state_dict: dict[str, Any], group: ProcessGroup | None) -> None:
        super().__init__()
        self._group = group
        self._reused: _FinishedPlan | None = None
        self.global_metadata: Metadata | None = None
        super().set_up_planner(state_dict, is_coordinator=group is None or group.rank() == 0)
        self._requested = super().create_local_plan()

    def reuse_last_plan(self) -> None:
        """Reuse the plan of the last save if every rank asked for the same then.

        Collective: over the group.
        """
        if self._group is None:
            return
        last = _last_plans.get(self._group)
        number = last.number if last and _is_same_request(last.requested, self._requested) else 0
        # The lowest and the highest number of all ranks: an interruption may have left a rank with an older plan.
        extremes = torch.tensor([number, -number], device="cpu")
        dist.all_reduce(extremes, dist.ReduceOp.MIN, self._group)
        lowest, highest = int(extremes[0]), -int(extremes[1])
        self._reused = last if 0 < lowest == highest else None

    def set_up_planner(  # torch looks at its signature
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        """Do nothing: the constructor has planned this rank's part."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([]) if self._reused else self._requested

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans = all_plans
        if self._reused:
            self.global_metadata = self._reused.metadata
        else:
            plans, self.global_metadata = super().create_global_plan(_leave_plain_values_to_first(all_plans))
            number = next(_plan_numbers)
            plans = [replace(plan, planner_data=number) for plan in plans]
        return plans, Metadata({})  # torch sends to all ranks what is returned here

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        if self._reused:
            new_plan = replace(self._reused.assigned, storage_data=new_plan.storage_data)
        elif self._group is not None:
            _last_plans[self._group] = _FinishedPlan(
                self._requested, new_plan, new_plan.planner_data, self.global_metadata
            )
        return super().finish_plan(new_plan)


def _leave_plain_values_to_first(plans: list[SavePlan]) -> list[SavePlan]:
    """The plans without the values beside tensors that the first rank has as well: torch would choose any rank's."""
    first, *others = plans
    plain = {item.index for item in first.items if item.type == WriteItemType.BYTE_IO}
    return [first, *(replace(plan, items=[it for it in plan.items if it.index not in plain]) for plan in others)]


def _is_same_request(left: SavePlan, right: SavePlan) -> bool:
    """Whether names, shapes, dtypes and cuts are the same; ``planner_data`` holds the keys that make up each name."""
    return left.items == right.items and left.planner_data == right.planner_data
