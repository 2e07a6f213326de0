"""Saving: everything in a dictionary becomes one folder, visible only when it is complete."""

from __future__ import annotations

import copy
import logging
import operator
import os
from collections.abc import Mapping, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from ema_dist.checkpoint.agreement import alike, by_rank, come, on_first, together
from ema_dist.checkpoint.entries import Average, Entry, Model, Other
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.folders import begin, folder_of
from ema_dist.checkpoint.manifest import Manifest
from ema_dist.checkpoint.optimizers import OptimizerEntry
from ema_dist.checkpoint.writer import Writer
from ema_dist.ema import ShardedEMA
from ema_dist.sharding import cpu_copy

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pending:
    """A save in the background."""

    folder: Path
    done: Future[Any]


_pending: list[Pending] = []
"""The save in the background, if there is one."""


def save(
    state: Mapping[str, Any],
    root: str | os.PathLike[str],
    *,
    step: int,
    keep: int | None = 3,
    block: bool = True,
    timeout: float = 60.0,
) -> None:
    """Write ``state`` into ``root/step-NNNNNNNNNN``, which has its name only when every rank has written its part.

    Modules are saved by their live weights, also inside `ShardedEMA.swapped`, under the names that the unwrapped
    module's ``state_dict()`` has; optimizers by the names of the parameters, so the modules that they step must be in
    ``state`` too. Of plain values, and of what other ``Stateful`` objects return that is not cut over ranks, one
    rank's is kept.

    Args:
        state: modules, optimizers, `ShardedEMA`, other ``Stateful`` objects and plain values.
        step: non-negative; a checkpoint of the same step is replaced, those of later ones are set aside.
        keep: how many complete checkpoints stay in ``root``; None for all.
        block: otherwise return when everything has been copied to the memory of the CPU, and write in the background;
            see `wait`.
        timeout: seconds that ranks wait for each other before they start.

    Collective: over all ranks.
    Memory: nothing; one copy of this rank's part of ``state`` in the CPU's memory with ``block=False``, or inside
        `ShardedEMA.swapped` one of its averages.
    Raises: ValueError for a step or ``keep`` out of range; RuntimeError on every rank when a value cannot be saved, a
        save in the background has failed, ranks hold different models, or one does not come; `CheckpointError`, which
        is one, when writing fails.
    """
    step = _checked_step(step, keep)
    root = Path(root).absolute()
    entries: dict[str, Entry] = {}
    problem = _failure()
    if not problem:
        try:
            entries = entries_of(dict(state))
        except Exception as error:  # noqa: BLE001  whatever it is, the other ranks must get to know
            problem = str(error)
    group = come(f"checkpoint.save(step={step})", timeout=timeout, problem=problem)
    what = "the names of what is saved (pipeline stages: save them by torch.distributed.checkpoint)"
    alike(what, _names(entries), group)
    contents, wrong = _saved(entries, copied=not block)
    if wrong := together([by_rank(problem, group) for problem in wrong], group):
        raise RuntimeError(f"step {step} is not saved: {'; '.join(wrong)}")
    manifest = _manifest(step, entries, group)
    writer = Writer(on_first(lambda: begin(root, step), group), manifest, keep=keep)
    if block:
        try:
            dcp.save(contents, storage_writer=writer, process_group=group)
        except CheckpointException as error:
            raise CheckpointError(f"{folder_of(root, step)} was not saved: {reasons(error)}") from error
    else:
        done = dcp.async_save(contents, storage_writer=writer, process_group=group)
        assert isinstance(done, Future), "the writer has staged by the time it returns"
        done.add_done_callback(_tell_failure)
        _pending.append(Pending(folder_of(root, step), done))


def wait() -> None:
    """Return when no save is going on in the background; call it before the process group is destroyed.

    Collective: no, but the save ends only when it does on every rank.
    Raises: `CheckpointError` when it failed.
    """
    if problem := _failure():
        raise CheckpointError(problem)


def entries_of(state: MutableMapping[str, Any]) -> dict[str, Entry]:
    """The values of ``state`` as what they are, in the order of their keys, which is the same on every rank."""
    if wrong := [key for key in state if not isinstance(key, str)]:
        raise ValueError(f"expected the names of what is saved as keys, got {wrong}")
    entries: dict[str, Entry] = {}
    models = {key: Model(key, value) for key, value in state.items() if isinstance(value, nn.Module)}
    for key, value in sorted(state.items()):
        match value:
            case nn.Module():
                entries[key] = models[key]
            case Optimizer():
                entries[key] = OptimizerEntry(key, value, [model.layout for model in models.values()])
            case ShardedEMA():
                entries[key] = Average(key, value)
            case _:
                entries[key] = Other(key, state)
    return entries


def _checked_step(step: int, keep: int | None) -> int:
    whole = operator.index(step)
    if isinstance(step, bool) or whole < 0 or (keep is not None and keep < 1):
        raise ValueError(f"expected a step of 0 or more and keep of 1 or more, got step={step}, keep={keep}")
    return whole


def _names(entries: Mapping[str, Entry]) -> list[str]:
    models = {key: entry for key, entry in entries.items() if isinstance(entry, Model)}
    return [*entries, *(f"{key}.{name}" for key, model in models.items() for name in model.layout.by_any_name())]


def _saved(entries: Mapping[str, Entry], *, copied: bool) -> tuple[dict[str, Any], list[str]]:
    """What DCP is to write, and what cannot be saved."""
    contents: dict[str, Any] = {}
    wrong: list[str] = []
    for key, entry in sorted(entries.items(), key=lambda item: not isinstance(item[1], Average)):  # those meet
        try:
            contents[key] = _copied(entry.saved(), {}) if copied else entry.saved()
        except Exception as error:  # noqa: BLE001, PERF203  all that is wrong is named at once
            wrong.append(f"{key!r}: {error}")
    # DCP spreads tensors that several ranks hold, in this order, over those with least to write so far; of a cut tensor
    # it counts the whole, so that averages, cut by DDP's replicas, would make it believe that the first had most.
    return dict(sorted(contents.items(), key=lambda item: isinstance(entries[item[0]], Average))), wrong


def _copied(value: Any, copies: dict[int, Tensor]) -> Any:
    """Nested dictionaries and lists with a copy of every tensor in them, each made once."""
    match value:
        case Tensor():
            if id(value) not in copies:
                copies[id(value)] = cpu_copy(value)
            return copies[id(value)]
        case dict():
            return {key: _copied(item, copies) for key, item in value.items()}
        case list():
            return [_copied(item, copies) for item in value]
    return copy.deepcopy(value)


def _manifest(step: int, entries: Mapping[str, Entry], group: ProcessGroup | None) -> Manifest:
    """What can be said before anything is written."""
    models = {key: entry for key, entry in entries.items() if isinstance(entry, Model)}
    averages = {key: entry for key, entry in entries.items() if isinstance(entry, Average)}
    return Manifest(
        step=step,
        world_size=group.size() if group else 1,
        layouts={key: model.layout.summary for key, model in models.items()},
        ties={key: model.layout.ties for key, model in models.items()},
        models={key: name for key, its in averages.items() for name, model in models.items() if its.is_of(model)},
    )


def reasons(error: CheckpointException) -> str:
    """What went wrong, and where: DCP collects the failures of all ranks."""
    of_ranks: dict[str, list[int]] = {}
    for rank, (failure, _) in error.failures.items():
        of_ranks.setdefault(f"{type(failure).__name__}: {failure}", []).append(rank)
    return "; ".join(f"on ranks {ranks}: {reason}" for reason, ranks in of_ranks.items())


def _failure() -> str:
    """Wait for the save in the background; why it failed, or an empty string."""
    if not _pending:
        return ""
    pending = _pending[0]
    error = pending.done.exception()
    _pending.clear()
    return f"{pending.folder} was not saved, in the background: {_reason(error)}" if error else ""


def _reason(error: BaseException) -> str:
    return reasons(error) if isinstance(error, CheckpointException) else f"{type(error).__name__}: {error}"


def _tell_failure(done: Future[Any]) -> None:
    # The next call raises it; but there may be none.
    if error := done.exception():
        _log.error("a checkpoint was not saved: %s", _reason(error))
