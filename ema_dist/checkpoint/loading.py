"""Loads the newest intact checkpoint, under any layout and number of ranks."""

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
    rank_and_size,
    require_same_names,
    run_on_first_rank,
)
from ema_dist.checkpoint.dcp.contents import Contents
from ema_dist.checkpoint.dcp.metadata import read_metadata
from ema_dist.checkpoint.dcp.reader import read_entries
from ema_dist.checkpoint.entries import EMAEntry, Entry
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.manifest import Manifest, files_to_verify, read_manifest, verify_files
from ema_dist.checkpoint.saving import make_entries, require_mapping, wait
from ema_dist.checkpoint.step_folders import complete_steps, locate
from ema_dist.modes import in_normal_mode


def latest(root: str | os.PathLike[str]) -> int | None:
    """Return the newest step with a complete checkpoint in ``root``, damaged or not; None if there is none.

    Collective: no.
    """
    return max(complete_steps(Path(root)), default=None)


@in_normal_mode
def load(
    state: MutableMapping[str, Any], root: str | os.PathLike[str], *, step: int | None = None, timeout: float = 60.0
) -> int | None:
    """Load a checkpoint into the values of ``state``, whatever layout and number of ranks saved it.

    Modules, optimizers, `ShardedEMA` and ``Stateful`` objects load what was saved under their key; a plain value is
    replaced in ``state``. All files are checked against their checksums before anything changes.

    - If the checkpoint lacks the key of a `ShardedEMA`, the averages start from its live weights, with a warning.
    - If ``state`` maps a module to a key that holds averages, they become the module's weights; tensors without an
      average are read from the model saved beside them.

    Args:
        root: the root that was passed to `save`, or one checkpoint; plain ``dcp.save`` writes no checksums to verify.
        step: the step to load; None for the newest intact one, with a warning that names what is wrong with newer ones.
        timeout: seconds that ranks wait for each other before they start.

    Returns: the step; None for a checkpoint of plain ``dcp.save``.

    Collective: over all ranks.
    Memory: one stored chunk of a tensor at a time; the state of an optimizer that has none is allocated.
    Raises: `CheckpointError` when there is no checkpoint, none is intact, or the pending background save has failed;
        RuntimeError on every rank, before anything changes, when names or shapes differ from those of ``state``, inside
        `ShardedEMA.swapped`, or when a rank does not arrive in time.
    """
    require_mapping(state, "checkpoint.load")
    wait()
    root = Path(root).absolute()
    call = f"checkpoint.load({'' if step is None else f'step={step}'})"
    group = checkpoint_rendezvous(call, timeout=timeout)
    require_same_names("the keys of the loaded values", [str(key) for key in state], group)
    checkpoint = _find_intact(root, step, group)
    contents = Contents(checkpoint.metadata, model_keys=checkpoint.manifest.models if checkpoint.manifest else {})
    # Plain values first: whether an entry fits depends on them (parameter groups, the format of averages).
    contents.plain_values.update(_plain_values_to_read(contents, state))
    read_entries(checkpoint.folder, contents.plain_values, metadata=checkpoint.metadata, group=group)
    entries: dict[str, Entry] = {}
    targets: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    try:
        entries = make_entries(state)
    except Exception as error:  # noqa: BLE001  every error must reach the other ranks
        problems.append(str(error))
    for key, entry in entries.items():
        try:
            targets[key] = entry.targets(contents)
        except Exception as error:  # noqa: BLE001, PERF203  all problems are reported at once
            problems.append(f"{key!r}: {error}")
    # No rank reads into its targets before every rank has found that its entries fit.
    checkpoint_rendezvous(f"{call} of {checkpoint.folder}", timeout=timeout, problem="; ".join(problems))
    read_entries(checkpoint.folder, *map(dict, targets.values()), metadata=checkpoint.metadata, group=group)
    # Averages last: where none are stored, they start from the live weights.
    for key, entry in sorted(entries.items(), key=lambda item: isinstance(item[1], EMAEntry)):
        try:
            entry.finish_load(contents)
        except Exception as error:  # noqa: BLE001, PERF203  every error must reach the other ranks
            problems.append(f"{key!r} failed to load its saved state: {error!r}")
    # Not by a rendezvous: the rank that hosts the store could leave it first and exit while others still need it.
    if failures := gather_problems([prefix_rank(problem, group) for problem in problems], group):
        raise RuntimeError("; ".join(failures))
    return checkpoint.manifest.step if checkpoint.manifest else None


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose manifest and metadata have been read."""

    folder: Path
    metadata: Metadata
    manifest: Manifest | None


def _plain_values_to_read(contents: Contents, keys: Iterable[str]) -> dict[str, Any]:
    """The values to read that are not tensors, by DCP name: those of the entries ``keys``, and all extra states."""
    names = [name for key in keys for name in contents.entry_names(key).values()]
    names += [
        name
        for key in contents.entry_keys
        for parts in contents.extra_states((key,)).values()
        for name in parts.values()
    ]
    return {name: None for name in names if name not in contents.tensors}


def _find_intact(root: Path, step: int | None, group: ProcessGroup | None) -> OpenedCheckpoint:
    """Open the newest checkpoint in which nothing is damaged.

    Collective: over ``group``.
    """
    damaged: list[str] = []
    for folder in run_on_first_rank(lambda: _candidates(root, step), group):
        problems, checkpoint = _open_and_verify(folder, group)
        if checkpoint is not None and not problems:
            if damaged and (group is None or group.rank() == 0):
                warnings.warn(
                    f"loaded {folder.name}, because newer checkpoints are damaged: {'; '.join(damaged)}", stacklevel=4
                )
            return checkpoint
        damaged += problems
    raise CheckpointError(f"no intact checkpoint in {root}: {'; '.join(damaged)}")


def _candidates(root: Path, step: int | None) -> list[Path]:
    folder = locate(root, step)
    return [folder] if step is not None or folder == root else [*complete_steps(root).values()][::-1]


def _open_and_verify(folder: Path, group: ProcessGroup | None) -> tuple[list[str], OpenedCheckpoint | None]:
    """Verify a checkpoint, each rank some files; return all ranks' problems, and the checkpoint if it can be read."""
    problems: list[str] = []
    checkpoint: OpenedCheckpoint | None = None
    try:
        if manifest := read_manifest(folder):
            problems = verify_files(folder, files_to_verify(manifest.files, *rank_and_size(group)))
        checkpoint = OpenedCheckpoint(folder, read_metadata(folder), manifest)
    except Exception as error:  # noqa: BLE001  every error must reach the other ranks
        problems.append(str(error) if isinstance(error, CheckpointError) else f"{folder}: {error!r}")
    return gather_problems(problems, group), checkpoint
