"""A DCP planner that reuses the plan of the last save, if every rank saves the same names, shapes and shards again."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItemType

from ema_dist.checkpoint.agreement import is_same_on_all_ranks

_plan_numbers = count(1)


@dataclass(frozen=True)
class _FinishedPlan:
    """The plan of one save, as this rank knows it.

    Args:
        requested: the items that this rank asked to write.
        assigned: the items that the first rank assigned to this rank.
        number: identifies the plan; the same on all ranks.
        metadata: describes the whole checkpoint; only on the first rank.
    """

    requested: SavePlan
    assigned: SavePlan
    number: int
    metadata: Metadata | None


_last_plans: MutableMapping[ProcessGroup, _FinishedPlan] = WeakKeyDictionary()
"""The plan of the last save over each group. It is not valid for another group, to whose ranks it assigns nothing."""


class SavePlanner(DefaultSavePlanner):
    """Plans to save ``state_dict`` as torch does, or reuses the plan of the last save over ``group``.

    torch gathers the plans of all ranks on the first one, which merges, validates and scatters them. The time grows
    with the numbers of ranks and tensors, and the result is the same for every save of a run. At the end, torch sends
    the metadata of the whole checkpoint to every rank, which takes even longer: here it stays on the first rank, as
    `global_metadata`.

    After the constructor and before ``dcp.save``, every rank calls `reuse_last_plan`.

    Memory: the last plan of each group is kept: some hundred bytes for each tensor that this rank writes, and on the
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
        """Reuse the plan of the last save if every rank requests what it requested then.

        Collective: over the group.
        """
        if self._group is None:
            return
        last = _last_plans.get(self._group)
        number = last.number if last and _is_same_request(last.requested, self._requested) else 0
        # An interrupted save may have stored its plan on some ranks only: their numbers differ.
        self._reused = last if is_same_on_all_ranks(number, self._group) and number else None

    def set_up_planner(  # torch looks for `storage_meta` in the signature
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
            # This field travels to every rank with its plan; torch has read the names in it by now.
            plans = [replace(plan, planner_data=number) for plan in plans]
        return plans, Metadata({})  # torch sends this result to all ranks

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        if self._reused:
            new_plan = self._reused.assigned
        elif self._group is not None:
            _last_plans[self._group] = _FinishedPlan(
                self._requested, new_plan, new_plan.planner_data, self.global_metadata
            )
        return super().finish_plan(new_plan)


def _leave_plain_values_to_first(plans: list[SavePlan]) -> list[SavePlan]:
    """Drop the values that are not tensors from the other ranks' plans, if the first rank has them too.

    Otherwise torch would choose a rank for each.
    """
    first, *others = plans
    plain = {item.index for item in first.items if item.type == WriteItemType.BYTE_IO}
    return [first, *(replace(plan, items=[it for it in plan.items if it.index not in plain]) for plan in others)]


def _is_same_request(left: SavePlan, right: SavePlan) -> bool:
    """Whether names, shapes, dtypes and shards are the same; ``planner_data`` has the keys that make up each name."""
    return left.items == right.items and left.planner_data == right.planner_data
