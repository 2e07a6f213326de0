"""Saves the values of a dictionary as one checkpoint folder, which gets its final name only when it is complete."""

from __future__ import annotations

import copy
import json
import logging
import operator
import os
from collections.abc import Mapping, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from ema_dist.checkpoint.agreement import (
    checkpoint_rendezvous,
    gather_problems,
    is_same_on_all_ranks,
    prefix_rank,
    require_same_names,
    run_on_first_rank,
)
from ema_dist.checkpoint.entries import EMAEntry, Entry, ModelEntry, OtherEntry
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.manifest import Manifest
from ema_dist.checkpoint.optimizer_entry import OptimizerEntry
from ema_dist.checkpoint.optimizer_wrappers import require_torch_optimizer
from ema_dist.checkpoint.planner import SavePlanner
from ema_dist.checkpoint.step_folders import commit, create_partial_folder, step_folder
from ema_dist.checkpoint.writer import CheckpointWriter
from ema_dist.ema import ShardedEMA
from ema_dist.kernels import copy_to_host
from ema_dist.messages import abbreviated, log_visibly
from ema_dist.modes import in_normal_mode
from ema_dist.sharding import cpu_copy

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingSave:
    """A save that is written in the background."""

    folder: Path
    future: Future[Any]


_pending_saves: list[PendingSave] = []
"""The background save that has not been waited for; at most one."""


@in_normal_mode
def save(
    state: Mapping[str, Any],
    root: str | os.PathLike[str],
    *,
    step: int,
    keep: int | None = 3,
    block: bool = True,
    timeout: float = 60.0,
) -> None:
    """Write ``state`` into the folder ``root/step-NNNNNNNNNN``, which appears when every rank has written its part.

    Modules are saved with their live weights, even inside `ShardedEMA.swapped`, under the names of the unwrapped
    module's ``state_dict()``. Optimizers are saved under the names of their parameters, so ``state`` must also hold the
    modules that they step. Tensors that are not sharded are saved from one rank, other values (plain ones, and those
    that other ``Stateful`` objects return) from rank 0.

    Args:
        state: modules, optimizers, `ShardedEMA`, other ``Stateful`` objects and plain values.
        step: non-negative; a checkpoint of the same step is replaced, checkpoints of later steps are set aside.
        keep: how many complete checkpoints to keep in ``root``; None for all.
        block: if False, return when everything has been copied to CPU memory, and write in the background; see `wait`.
        timeout: seconds that ranks wait for each other before they start.

    Collective: over all ranks.
    Memory: nothing; with ``block=False``, a copy of this rank's part of ``state`` on the CPU; inside
        `ShardedEMA.swapped`, a copy of its averages.
    Raises: ValueError for a step or ``keep`` out of range; RuntimeError on every rank when a value cannot be saved, the
        pending background save has failed, ranks hold different models, or a rank does not arrive in time;
        `CheckpointError`, which is a RuntimeError, when writing fails.
    """
    require_mapping(state, "checkpoint.save")
    step = _checked_step(step, keep)
    root = Path(root).absolute()
    entries: dict[str, Entry] = {}
    compared: list[Mapping[str, str]] = [{"keep": f"keep={keep}", "block": f"block={block}"}]
    problem = _wait_for_pending()
    if not problem:
        try:
            entries = make_entries(dict(state))
            compared += _calls_compared(entries)
        except Exception as error:  # noqa: BLE001  every error must reach the other ranks
            problem = str(error)
    call = f"checkpoint.save(step={step})"
    group = checkpoint_rendezvous(call, timeout=timeout, problem=problem, compared=compared, in_background=not block)
    label = "the names of the saved values (save pipeline stages with torch.distributed.checkpoint)"
    require_same_names(label, _saved_names(entries), group)
    state_dict, problems = _collect_state(entries, copy_to_cpu=not block)
    planner, planning_problems = _plan(state_dict, group) if not problems else (None, [])
    _require_no_problems(step, problems + planning_problems, group)
    _require_same_numbers(step, entries, group)
    assert planner is not None, "there was no problem on any rank"
    planner.reuse_last_plan()
    manifest = _make_manifest(step, entries, group)
    partial_folder = run_on_first_rank(lambda: create_partial_folder(root, step), group)
    writer = CheckpointWriter(partial_folder, manifest, planner, commit=partial(commit, keep=keep))
    if block:
        try:
            dcp.save(state_dict, storage_writer=writer, planner=planner, process_group=group)
        except CheckpointException as error:
            raise CheckpointError(f"{step_folder(root, step)} was not saved: {describe_failures(error)}") from error
    else:
        future = dcp.async_save(state_dict, storage_writer=writer, planner=planner, process_group=group)
        assert isinstance(future, Future), "CheckpointWriter.stage is synchronous, so async_save returns a plain future"
        future.add_done_callback(_log_failure)
        _pending_saves.append(PendingSave(step_folder(root, step), future))


def wait() -> None:
    """Wait for the pending background save, if there is one; call it before the process group is destroyed.

    Collective: no, but the save finishes only when every rank has written its part.
    Raises: `CheckpointError` when the save failed.
    """
    if problem := _wait_for_pending():
        raise CheckpointError(problem)


def require_mapping(state: object, call: str) -> None:
    """Raise TypeError unless ``state`` is a dictionary."""
    if not isinstance(state, Mapping):
        name = type(state).__name__
        raise TypeError(f"expected a dictionary, such as {call}({{'model': model}}, root), got a {name}")


def make_entries(state: MutableMapping[str, Any]) -> dict[str, Entry]:
    """Make an entry for each value of ``state``, in the order of the keys, which is the same on every rank."""
    if bad_keys := [key for key in state if not isinstance(key, str)]:
        raise ValueError(f"expected only strings as keys of the dictionary, got {bad_keys}")
    entries: dict[str, Entry] = {}
    models = {key: ModelEntry(key, value) for key, value in state.items() if isinstance(value, nn.Module)}
    for key, value in sorted(state.items()):
        match value:
            case nn.Module():
                entries[key] = models[key]
            case Optimizer():
                others = [other for other in state.values() if isinstance(other, Optimizer)]
                entries[key] = OptimizerEntry(key, value, [model.layout for model in models.values()], others)
            case ShardedEMA():
                entries[key] = EMAEntry(key, value, models.values())
            case _:
                require_torch_optimizer(value, key)
                entries[key] = OtherEntry(key, state)
    return entries


def _checked_step(step: int, keep: int | None) -> int:
    number = operator.index(step)
    if isinstance(step, bool) or number < 0 or (keep is not None and keep < 1):
        raise ValueError(f"expected a step of 0 or more and keep of 1 or more, got step={step}, keep={keep}")
    return number


def _calls_compared(entries: Mapping[str, Entry]) -> list[Mapping[str, str]]:
    """The calls and counts of all averages, which must be equal on all ranks: each rank saves its part of them."""
    by_stage: dict[int, dict[str, str]] = {}
    for key, entry in entries.items():
        if isinstance(entry, EMAEntry):
            for stage, texts in enumerate(entry.compared()):
                by_stage.setdefault(stage, {}).update(
                    {f"{key} {name}": f"{text} on {key!r}" for name, text in texts.items()}
                )
    return [*by_stage.values()]


def _saved_names(entries: Mapping[str, Entry]) -> list[str]:
    models = {key: entry for key, entry in entries.items() if isinstance(entry, ModelEntry)}
    return [*entries, *(f"{key}.{name}" for key, model in models.items() for name in model.layout.shards_by_name())]


def _collect_state(entries: Mapping[str, Entry], *, copy_to_cpu: bool) -> tuple[dict[str, Any], list[str]]:
    """The state for DCP to write, and the problems with values that cannot be saved."""
    state_dict: dict[str, Any] = {}
    problems: list[str] = []
    # Averages first: their state_dict() is a rendezvous with a timeout, which slower copies must not use up.
    for key, entry in sorted(entries.items(), key=lambda item: not isinstance(item[1], EMAEntry)):
        try:
            state_dict[key] = _copy_to_cpu(entry.state_to_save(), {}) if copy_to_cpu else entry.state_to_save()
        except Exception as error:  # noqa: BLE001, PERF203  all problems are reported at once
            problems.append(f"{key!r}: {error}")
    # Averages last: in this order, DCP assigns each tensor that several ranks hold to the rank with the fewest bytes so
    # far, and counts a sharded tensor at its full size. Averages sharded over replicas would make rank 0 look busiest.
    return dict(sorted(state_dict.items(), key=lambda item: isinstance(entries[item[0]], EMAEntry))), problems


def _plan(state_dict: dict[str, Any], group: ProcessGroup | None) -> tuple[SavePlanner | None, list[str]]:
    """The planner of a save; None and the problem if DCP cannot plan it."""
    try:
        with torch.device("cpu"):  # DTensor computes offsets in tensors on the default device, perhaps "meta"
            return SavePlanner(state_dict, group), []
    except Exception as error:  # noqa: BLE001  every error must reach the other ranks
        return None, [f"DCP cannot plan this save: {error!r}"]


def _require_no_problems(step: int, problems: list[str], group: ProcessGroup | None) -> None:
    """Raise RuntimeError on every rank if one has problems. Collective: over ``group``."""
    if all_problems := gather_problems([prefix_rank(problem, group) for problem in problems], group):
        raise RuntimeError(f"step {step} is not saved: {'; '.join(all_problems)}")


def _require_same_numbers(step: int, entries: Mapping[str, Entry], group: ProcessGroup | None) -> None:
    """Raise RuntimeError on every rank if numbers in the states of sharded parameters differ between ranks.

    An optimizer may compute such numbers (norms) from its part of a parameter, but a checkpoint holds one rank's.

    Collective: over ``group``.
    """
    if group is None:
        return
    numbers: dict[str, str] = {}
    for entry in entries.values():
        if isinstance(entry, OptimizerEntry):
            numbers |= entry.numbers_of_sharded_parameters()
    digest = crc32(json.dumps(numbers, sort_keys=True).encode())
    if is_same_on_all_ranks(digest, group):
        return
    numbers_of_ranks: list[dict[str, str]] = [{}] * group.size()
    dist.all_gather_object(numbers_of_ranks, numbers, group=group)
    values: dict[str, set[str]] = {}
    for numbers_of_rank in numbers_of_ranks:  # a rank without elements of a parameter has no numbers for it
        for name, number in numbers_of_rank.items():
            values.setdefault(name, set()).add(number)
    if different := sorted(name for name, numbers_of_name in values.items() if len(numbers_of_name) > 1):
        raise RuntimeError(
            f"step {step} is not saved: {abbreviated(different)} differ between ranks, but a checkpoint holds one "
            "value of each: use an optimizer that computes the same numbers on all ranks that share a parameter"
        )


def _copy_to_cpu(value: Any, memo: dict[int, Tensor]) -> Any:
    """Copy nested dictionaries and lists, and every tensor in them once."""
    match value:
        case Tensor():
            if id(value) not in memo:
                memo[id(value)] = cpu_copy(value, copy_to_host)
            return memo[id(value)]
        case dict():
            return {key: _copy_to_cpu(item, memo) for key, item in value.items()}
        case list():
            return [_copy_to_cpu(item, memo) for item in value]
    return copy.deepcopy(value)


def _make_manifest(step: int, entries: Mapping[str, Entry], group: ProcessGroup | None) -> Manifest:
    """The manifest without its files, which have not been written yet."""
    models = {key: entry for key, entry in entries.items() if isinstance(entry, ModelEntry)}
    averages = {key: entry for key, entry in entries.items() if isinstance(entry, EMAEntry)}
    return Manifest(
        step=step,
        world_size=group.size() if group else 1,
        layouts={key: model.layout.summary for key, model in models.items()},
        ties={key: model.layout.ties for key, model in models.items()},
        models={
            key: name
            for key, average in averages.items()
            for name, model in models.items()
            if average.belongs_to(model)
        },
    )


def describe_failures(error: CheckpointException) -> str:
    """Describe the failures that DCP collected from all ranks, grouped by reason."""
    ranks_by_reason: dict[str, list[int]] = {}
    for rank, (failure, _) in error.failures.items():
        ranks_by_reason.setdefault(f"{type(failure).__name__}: {failure}{_explain(failure)}", []).append(rank)
    return "; ".join(f"on ranks {ranks}: {reason}" for reason, ranks in ranks_by_reason.items())


def _explain(failure: BaseException) -> str:
    # torch does not report why a write to a tensor's file failed.
    return " (a file could not be written: is the disk full?)" if "inline_container" in str(failure) else ""


def _wait_for_pending() -> str:
    """Wait for the background save and return why it failed, or an empty string."""
    if not _pending_saves:
        return ""
    pending = _pending_saves[0]
    error = pending.future.exception()
    _pending_saves.clear()
    return f"the background save of {pending.folder} failed: {_describe_error(error)}" if error else ""


def _describe_error(error: BaseException) -> str:
    return describe_failures(error) if isinstance(error, CheckpointException) else f"{type(error).__name__}: {error}"


def _log_failure(future: Future[Any]) -> None:
    # The next save or wait raises it, but the program may end without calling either.
    if error := future.exception():
        log_visibly(_log, logging.ERROR, f"a checkpoint was not saved: {_describe_error(error)}")
