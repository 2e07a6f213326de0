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

from ema_dist.checkpoint.agreement import alike, by_rank, come, on_first, together
from ema_dist.checkpoint.dcp.contents import Contents
from ema_dist.checkpoint.dcp.metadata import read_metadata
from ema_dist.checkpoint.dcp.reader import read
from ema_dist.checkpoint.entries import Entry
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.folders import complete_steps, locate
from ema_dist.checkpoint.manifest import Manifest, problems, read_manifest, share
from ema_dist.checkpoint.saving import entries_of, wait


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
    group = come("checkpoint.load()", timeout=timeout)
    alike("the keys of what is loaded", [str(key) for key in state], group)
    sound = _soundest(root, step, group)
    contents = Contents(sound.metadata, model_keys=sound.manifest.models if sound.manifest else {})
    contents.scalars.update(_plain_values(contents, state))
    read(sound.folder, contents.scalars, metadata=sound.metadata, group=group)
    entries: dict[str, Entry] = {}
    targets: dict[str, dict[str, Tensor]] = {}
    wrong: list[str] = []
    try:
        entries = entries_of(state)
    except Exception as error:  # noqa: BLE001  whatever it is, the other ranks must get to know
        wrong.append(str(error))
    for key, entry in entries.items():
        try:
            targets[key] = entry.targets(contents)
        except Exception as error:  # noqa: BLE001, PERF203  all that is wrong is named at once
            wrong.append(f"{key!r}: {error}")
    come(f"checkpoint.load() of {sound.folder}", timeout=timeout, problem="; ".join(wrong))
    read(sound.folder, *map(dict, targets.values()), metadata=sound.metadata, group=group)
    for key, entry in entries.items():
        try:
            entry.take(contents)
        except Exception as error:  # noqa: BLE001, PERF203  this rank's weights are read; the other ranks must get to know
            wrong.append(f"{key!r} does not take over what was saved: {error!r}")
    # Not by a meeting: who leaves it first may be the one that has the store, and end.
    if lost := together([by_rank(problem, group) for problem in wrong], group):
        raise RuntimeError("; ".join(lost))
    return sound.manifest.step if sound.manifest else None


@dataclass(frozen=True)
class Sound:
    """A checkpoint in which nothing is damaged."""

    folder: Path
    metadata: Metadata
    manifest: Manifest | None


def _plain_values(contents: Contents, keys: Iterable[str]) -> dict[str, Any]:
    """What is to be read that is not a tensor, by DCP's names: in these entries, and in extra states beside them."""
    wanted = [name for key in keys for name in contents.of(key).values()]
    wanted += [name for key in contents.keys for of in contents.extra_states((key,)).values() for name in of.values()]
    return {name: None for name in wanted if name not in contents.tensors}


def _soundest(root: Path, step: int | None, group: ProcessGroup | None) -> Sound:
    """The newest checkpoint in which nothing is damaged.

    Collective: over ``group``.
    """
    damaged: list[str] = []
    for folder in on_first(lambda: _candidates(root, step), group):
        found, sound = _checked(folder, group)
        if sound is not None and not found:
            if damaged and (group is None or group.rank() == 0):
                warnings.warn(f"passed over, and loaded {folder.name} instead: {'; '.join(damaged)}", stacklevel=3)
            return sound
        damaged += found
    raise CheckpointError(f"no sound checkpoint in {root}: {'; '.join(damaged)}")


def _candidates(root: Path, step: int | None) -> list[Path]:
    found = locate(root, step)
    return [found] if step is not None or found == root else [*complete_steps(root).values()][::-1]


def _checked(folder: Path, group: ProcessGroup | None) -> tuple[list[str], Sound | None]:
    """What is wrong with a checkpoint, of which each rank checks its share; the checkpoint, if it can be read here."""
    mine: list[str] = []
    sound: Sound | None = None
    try:
        if manifest := read_manifest(folder):
            rank, count = (group.rank(), group.size()) if group else (0, 1)
            mine = problems(folder, share(manifest.files, rank, count))
        sound = Sound(folder, read_metadata(folder), manifest)
    except Exception as error:  # noqa: BLE001  whatever it is, the other ranks must get to know
        mine.append(str(error) if isinstance(error, CheckpointError) else f"{folder}: {error!r}")
    return together(mine, group), sound
