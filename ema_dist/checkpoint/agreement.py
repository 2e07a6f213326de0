"""Agreement between the ranks that save or load a checkpoint: rendezvous, results, names and problems."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.communication.rendezvous import advice_on_absence, rendezvous
from ema_dist.messages import abbreviated

T = TypeVar("T")


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """Return this rank in ``group`` and the number of ranks; ``(0, 1)`` without a group."""
    return (group.rank(), group.size()) if group else (0, 1)


_groups: MutableMapping[object, ProcessGroup] = WeakKeyDictionary()
"""The gloo group made beside each default group, for background saves and default groups without a CPU backend."""


def checkpoint_rendezvous(
    call: str,
    *,
    timeout: float,
    problem: str = "",
    compared: Sequence[Mapping[str, str]] = (),
    in_background: bool = False,
) -> ProcessGroup | None:
    """Wait until all ranks have reached ``call``; return the group for checkpoints, None without a process group.

    This is the default group if it communicates on the CPU. Otherwise, and for background saves, it is a separate gloo
    group, created once: two threads cannot use one group at the same time.

    Args:
        compared: as for `rendezvous`.
        in_background: whether another thread will communicate over the group.

    Collective: over the default process group.
    Raises: RendezvousError when a rank does not arrive in time or arrives with a problem, and when ranks differ.
    """
    if not dist.is_initialized():
        # torch warns about the missing process group at each single-process save and load, sometimes in a thread.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        rendezvous(call, [], timeout=timeout, problem=problem)
        return None
    advice = advice_on_absence(takes_timeout=call.partition("(")[0])
    ranks = list(range(dist.get_world_size()))
    rendezvous(call, ranks, timeout=timeout, problem=problem, compared=compared, advice=advice)
    world = dist.group.WORLD
    assert isinstance(world, ProcessGroup), "there is a process group"
    if not in_background and "cpu:" in dist.get_backend_config(world):  # for instance "cuda:nccl,cpu:gloo"
        return world
    if world not in _groups:
        group = dist.new_group(backend="gloo")
        assert isinstance(group, ProcessGroup), "every rank of the world is in it"
        _groups[world] = group
    return _groups[world]


def run_on_first_rank(call: Callable[[], T], group: ProcessGroup | None) -> T:
    """Call ``call`` on the first rank and return its result on every rank; an error becomes a CheckpointError on all.

    Collective: over ``group``.
    """
    outcome: list[tuple[T | None, str]] = [(None, "")]
    if group is None or group.rank() == 0:
        try:
            outcome = [(call(), "")]
        except Exception as error:  # noqa: BLE001  the other ranks wait for the broadcast
            outcome = [(None, _describe(error))]
    if group is not None:
        dist.broadcast_object_list(outcome, src=0, group=group)
    result, problem = outcome[0]
    if problem:
        raise CheckpointError(problem)
    return result  # pyrefly: ignore  a call that did not raise has returned its own type


def run_on_all_ranks(call: Callable[[], T], group: ProcessGroup | None) -> T:
    """Call ``call`` on every rank and return its result there; an error on one becomes a CheckpointError on all.

    A rank on which ``call`` raised a ValueError or a RuntimeError raises that error instead.

    Collective: over ``group``.
    """
    results: list[T] = []
    cause = None
    try:
        results.append(call())
    except Exception as error:  # noqa: BLE001  every error must reach the other ranks
        cause = error
    if problems := gather_problems([prefix_rank(_describe(cause), group)] if cause else [], group):
        if isinstance(cause, (ValueError, RuntimeError)):
            raise cause
        raise CheckpointError("; ".join(problems)) from cause
    return results[0]


def require_same_names(label: str, names: Sequence[str], group: ProcessGroup | None) -> None:
    """Raise RuntimeError on every rank unless ``names`` are the same on all ranks.

    Args:
        label: describes the names in the error.

    Collective: over ``group``.
    """
    if different := describe_rank_differences(names, group):
        raise RuntimeError(f"{label} must be the same on every rank, but {different}")


def describe_rank_differences(names: Sequence[str], group: ProcessGroup | None) -> str:
    """Describe which names are not on all ranks, with the same text on every rank; empty if all ranks agree.

    Collective: over ``group``.
    """
    differing = sorted({*names} ^ {*run_on_first_rank(lambda: names, group)})
    report = f"ranks 0 and {group.rank()} differ in {abbreviated(differing)}" if differing and group else ""
    return "; ".join(gather_problems([report] * bool(report), group))


def is_same_on_all_ranks(number: int, group: ProcessGroup) -> bool:
    """Whether every rank passes the same ``number``. Collective: over ``group``."""
    lowest_and_negated_highest = torch.tensor([number, -number], device="cpu")
    dist.all_reduce(lowest_and_negated_highest, dist.ReduceOp.MIN, group)
    return not lowest_and_negated_highest.sum()


def gather_problems(problems: list[str], group: ProcessGroup | None) -> list[str]:
    """Return the problems of all ranks, in rank order and without duplicates.

    Collective: over ``group``.
    """
    if group is None:
        return problems
    has_problems = torch.tensor(bool(problems), dtype=torch.int32, device="cpu")
    dist.all_reduce(has_problems, dist.ReduceOp.MAX, group)
    problems_per_rank: list[list[str]] = [[] for _ in range(group.size())]
    if has_problems:
        dist.all_gather_object(problems_per_rank, problems, group=group)
    return list(dict.fromkeys(problem for rank_problems in problems_per_rank for problem in rank_problems))


def prefix_rank(problem: str, group: ProcessGroup | None) -> str:
    """Prefix a problem with the rank that has it."""
    return problem if group is None else f"rank {group.rank()}: {problem}"


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, (CheckpointError, OSError)) else repr(error)
