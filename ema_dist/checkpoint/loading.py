"""Loading: the newest complete checkpoint that is sound, into whatever is here, however it is cut."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata

from ema_dist.checkpoint.agreement import (
    checkpoint_rendezvous,
    gather_problems,
    prefix_rank,
    require_same_names,
    run_on_first_rank,
)
from ema_dist.checkpoint.dcp.contents import Contents
from ema_dist.checkpoint.dcp.metadata import read_metadata
from ema_dist.checkpoint.dcp.reader import read_entries
from ema_dist.checkpoint.entries import Entry
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.manifest import Manifest, files_to_verify, read_manifest, verify_files
from ema_dist.checkpoint.saving import make_entries, wait
from ema_dist.checkpoint.step_folders import complete_steps, locate


def latest(root: str | os.PathLike[str]) -> int | None:
    """The newest step with a complete checkpoint in ``root``, sound or not; None when there is none.

    Collective: no.
    """
    return max(complete_steps(Path(root)), default=None)


def load(
    state: MutableMapping[str, Any], root: str | os.PathLike[str], *, step: int | None = None, timeout: float = 60.0
) -> int | None:
    """Put a checkpoint into everything in ``state``, whatever layout and number of ranks saved it; the step it is of.

    Modules, optimizers, `ShardedEMA` and ``Stateful`` objects take over what was saved under their key; a plain value
    is replaced in ``state``. All files are checked against their checksums before anything changes.

    - A `ShardedEMA` under a key that the checkpoint lacks starts from the live weights in it, with a warning.
    - A module under a key that holds averages gets them as its weights, and from the model saved beside them what has
      no average.

    Args:
        root: a folder in which `save` has saved; or one checkpoint, also of plain ``dcp.save`` (unchecked, then).
        step: which one; None for the newest, or the newest that is sound, with a warning naming what is wrong with it.
        timeout: seconds that ranks wait for each other before they start.

    Returns: the step; None for a checkpoint of plain ``dcp.save``.

    Collective: over all ranks.
    Memory: one stored piece of a tensor at a time; an optimizer without a state gets one.
    Raises: `CheckpointError` when there is no checkpoint, none is sound, or a save in the background has failed;
        RuntimeError on every rank, before anything changes, when names or shapes are not those of ``state``, inside
        `ShardedEMA.swapped`, or when a rank does not come.
    """
    wait()
    root = Path(root).absolute()
    group = checkpoint_rendezvous("checkpoint.load()", timeout=timeout)
    require_same_names("the keys of what is loaded", [str(key) for key in state], group)
    checkpoint = _find_intact(root, step, group)
    contents = Contents(checkpoint.metadata, model_keys=checkpoint.manifest.models if checkpoint.manifest else {})
    contents.plain_values.update(_plain_values_to_read(contents, state))
    read_entries(checkpoint.folder, contents.plain_values, metadata=checkpoint.metadata, group=group)
    entries: dict[str, Entry] = {}
    targets: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    try:
        entries = make_entries(state)
    except Exception as error:  # noqa: BLE001  whatever it is, the other ranks must get to know
        problems.append(str(error))
    for key, entry in entries.items():
        try:
            targets[key] = entry.targets(contents)
        except Exception as error:  # noqa: BLE001, PERF203  all that is wrong is named at once
            problems.append(f"{key!r}: {error}")
    checkpoint_rendezvous(f"checkpoint.load() of {checkpoint.folder}", timeout=timeout, problem="; ".join(problems))
    read_entries(checkpoint.folder, *map(dict, targets.values()), metadata=checkpoint.metadata, group=group)
    for key, entry in entries.items():
        try:
            entry.finish_load(contents)
        except Exception as error:  # noqa: BLE001, PERF203  this rank's weights are read; the other ranks must get to know
            problems.append(f"{key!r} does not take over what was saved: {error!r}")
    # Not by a meeting: who leaves it first may be the one that has the store, and end.
    if failures := gather_problems([prefix_rank(problem, group) for problem in problems], group):
        raise RuntimeError("; ".join(failures))
    return checkpoint.manifest.step if checkpoint.manifest else None


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint in which nothing is damaged."""

    folder: Path
    metadata: Metadata
    manifest: Manifest | None


def _plain_values_to_read(contents: Contents, keys: Iterable[str]) -> dict[str, Any]:
    """What is to be read that is not a tensor, by DCP's names: in these entries, and in extra states beside them."""
    wanted = [name for key in keys for name in contents.entry_names(key).values()]
    wanted += [
        name
        for key in contents.entry_keys
        for parts in contents.extra_states((key,)).values()
        for name in parts.values()
    ]
    return {name: None for name in wanted if name not in contents.tensors}


def _find_intact(root: Path, step: int | None, group: ProcessGroup | None) -> OpenedCheckpoint:
    """The newest checkpoint in which nothing is damaged.

    Collective: over ``group``.
    """
    damaged: list[str] = []
    for folder in run_on_first_rank(lambda: _candidates(root, step), group):
        problems, checkpoint = _open_and_verify(folder, group)
        if checkpoint is not None and not problems:
            if damaged and (group is None or group.rank() == 0):
                warnings.warn(f"passed over, and loaded {folder.name} instead: {'; '.join(damaged)}", stacklevel=3)
            return checkpoint
        damaged += problems
    raise CheckpointError(f"no sound checkpoint in {root}: {'; '.join(damaged)}")


def _candidates(root: Path, step: int | None) -> list[Path]:
    folder = locate(root, step)
    return [folder] if step is not None or folder == root else [*complete_steps(root).values()][::-1]


def _open_and_verify(folder: Path, group: ProcessGroup | None) -> tuple[list[str], OpenedCheckpoint | None]:
    """What is wrong with a checkpoint, of which each rank checks its share; the checkpoint, if it can be read here."""
    problems: list[str] = []
    checkpoint: OpenedCheckpoint | None = None
    try:
        if manifest := read_manifest(folder):
            rank, count = (group.rank(), group.size()) if group else (0, 1)
            problems = verify_files(folder, files_to_verify(manifest.files, rank, count))
        checkpoint = OpenedCheckpoint(folder, read_metadata(folder), manifest)
    except Exception as error:  # noqa: BLE001  whatever it is, the other ranks must get to know
        problems.append(str(error) if isinstance(error, CheckpointError) else f"{folder}: {error!r}")
    return gather_problems(problems, group), checkpoint
