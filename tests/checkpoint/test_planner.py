"""Later saves reuse the plan of the first one, and only if every rank saves what it saved then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ema_dist import checkpoint
from ema_dist.checkpoint import planner
from tests.checkpoint.test_save_and_load import assert_stored_equal, make_run, read_all, state_of, train
from tests.support.layouts import layouts


def _count_plans(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often torch merges the plans of all ranks from now on, which it does on the first rank."""
    count = Counter({"plans": 0})
    create: Callable[..., Any] = DefaultSavePlanner.create_global_plan

    def create_and_count(planner: DefaultSavePlanner, all_plans: list[Any]) -> Any:  # noqa: ANN401
        count["plans"] += 1
        return create(planner, all_plans)

    monkeypatch.setattr(DefaultSavePlanner, "create_global_plan", create_and_count)
    return count


def _save(state: dict[str, Any], root: Path, step: int, *, block: bool = True) -> dict[str, Any]:
    """What plain DCP reads of a save of ``state``."""
    checkpoint.save(state, root, step=step, block=block)
    checkpoint.wait()
    dist.barrier()
    return read_all(root / f"step-{step:010}")


def _rows(values: Tensor) -> Tensor:
    """``values`` as a DTensor, sharded by rows over all ranks."""
    return distribute_tensor(values, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])


def _require_planned(count: Counter[str], times: int) -> None:
    assert count["plans"] == (times if dist.get_rank() == 0 else 0)


@layouts("ddp", "fsdp1", "fsdp2", "hsdp", "tp")
@pytest.mark.parametrize("mode", ["block", "background"])
def test_later_saves_of_a_run_are_not_planned_again(
    layout: str, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan_count = _count_plans(monkeypatch)
    run = make_run(layout)
    for step in range(1, 4):
        train(run, step)
        saved = _save(state_of(run), tmp_path / "reused", step, block=mode == "block")
    _require_planned(plan_count, 1)
    dist.barrier()
    _save({"other": torch.ones(3)}, tmp_path / "other", 1, block=mode == "block")
    assert_stored_equal(saved, _save(state_of(run), tmp_path / "planned", 3, block=mode == "block"))
    _require_planned(plan_count, 3)


CHANGES = {
    "shape": lambda: {"x": _rows(torch.arange(12.0).view(6, 2))},
    "dtype": lambda: {"x": _rows(torch.arange(12).view(4, 3))},
    "name": lambda: {"y": _rows(torch.arange(12.0).view(4, 3))},
    "sharding": lambda: {"x": torch.arange(12.0).view(4, 3)},
    "type": lambda: {"x": "text"},
    "keys of one name": lambda: {"x": {"a.b": 1}},
}


@pytest.mark.world_size(2)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_planned(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan_count = _count_plans(monkeypatch)
    first = {"x": {"a": {"b": 1}}} if change.startswith("keys") else {"x": _rows(torch.ones(4, 3))}
    _save(first, tmp_path, 1)
    changed = CHANGES[change]()
    _save(changed, tmp_path, 2)
    _require_planned(plan_count, 2)
    targets = {key: torch.zeros_like(value) if isinstance(value, Tensor) else None for key, value in changed.items()}
    checkpoint.load(targets, tmp_path, step=2)
    full = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in targets.items()}
    expected = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in changed.items()}
    assert all(
        torch.equal(full[key], value) if isinstance(value, Tensor) else full[key] == value
        for key, value in expected.items()
    )


@pytest.mark.world_size(2)
def test_a_change_on_one_rank_is_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rank 1 asks for the same in both saves, but must write more when rank 0 no longer holds the tensor."""
    plan_count = _count_plans(monkeypatch)
    _save({"x": {"a": torch.ones(3), "b": torch.ones(3)}}, tmp_path, 1)
    twos = torch.full((3,), 2.0)
    saved = _save({"x": {"a": twos} if dist.get_rank() == 0 else {"a": twos, "b": twos}}, tmp_path, 2)
    _require_planned(plan_count, 2)
    assert_stored_equal(saved, {"x.a": twos, "x.b": twos})


@pytest.mark.world_size(2)
def test_a_rank_with_an_older_plan_has_it_planned_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As after an interruption: the plans fit on both ranks, but were not made together."""
    plan_count = _count_plans(monkeypatch)
    weights = nn.Linear(4, 4)
    _save({"model": weights}, tmp_path, 1)
    older = dict(planner._last_plans)  # noqa: SLF001
    _save({"model": weights, "more": torch.ones(2)}, tmp_path, 2)
    _save({"model": weights}, tmp_path, 3)
    if dist.get_rank() == 1:
        planner._last_plans.update(older)  # noqa: SLF001
    _save({"model": weights}, tmp_path, 4)
    _require_planned(plan_count, 4)
    _save({"model": weights}, tmp_path, 5)
    _require_planned(plan_count, 4)


@pytest.mark.world_size(2)
def test_what_cannot_be_planned_is_refused_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if dist.get_rank() == 1:
        monkeypatch.setattr(DefaultSavePlanner, "create_local_plan", lambda _: 1 / 0)
    with pytest.raises(RuntimeError, match=r"rank 1: .*ZeroDivisionError"):
        checkpoint.save({"x": torch.ones(2)}, tmp_path, step=1)
    assert not [*tmp_path.iterdir()]


@pytest.mark.world_size(4)
def test_plain_values_are_those_of_the_first_rank(tmp_path: Path) -> None:
    """And of other ranks, where the first rank has none."""
    rank = dist.get_rank()
    numbers = {f"number {index}": rank for index in range(8)}
    saved = _save(numbers | {"large": torch.ones(1000), "own": {f"of {rank}": rank}}, tmp_path, 1)
    assert {saved[name] for name in numbers} == {0}
    assert {saved[f"own.of {other}"] for other in range(4)} == {0, 1, 2, 3}
