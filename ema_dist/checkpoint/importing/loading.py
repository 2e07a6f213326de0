"""Loads averages of another package into a `ShardedEMA`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.importing.averages_output import make_ema_state
from ema_dist.checkpoint.importing.detection import KindOrAuto, open_averages, require_known
from ema_dist.checkpoint.importing.named_tensors import NamedTensors
from ema_dist.checkpoint.importing.reference import Reference
from ema_dist.checkpoint.importing.resolution import ResolvedAverages, resolve
from ema_dist.ema import ShardedEMA
from ema_dist.messages import abbreviated, warn_caller
from ema_dist.modes import in_normal_mode
from ema_dist.sharding import Layout, is_sharded

_log = logging.getLogger(__name__)


@in_normal_mode
def import_averages(
    source: str | os.PathLike[str],
    ema: ShardedEMA,
    *,
    kind: KindOrAuto = "auto",
    reference: str | os.PathLike[str] | None = None,
    steps: int | None = None,
) -> None:
    """Load averages that another package has stored into ``ema``, with their counts, on any layout.

    Reads files of torch's ``AveragedModel``, Lightning, timm, diffusers, ema-pytorch, Composer, torchtitan and NeMo.
    Nothing in them is run. The model of ``ema`` determines names, order, buffers and frozen parameters. Live weights
    and the averaging law of ``ema`` do not change. If the file does not record counts, steps and updates become 0.

    Args:
        source: a file or folder on the first rank; ignored on other ranks.
        kind: its format; ``"auto"`` detects it from the content.
        reference: a file with weights of the model, for tensors without an average in ``source``, such as buffers.
            Without it, buffers keep their values in ``ema``.
        steps: how many steps the averages cover, for a source that does not record it. The steps up to ``start`` of
            ``ema`` count as steps before averaging, unless the source records a start of its own.

    Collective: over all ranks that hold the model.
    Memory: one full tensor, and a copy of this rank's averages; on the first rank also the tensors of the file, if
        torch cannot map it into memory.
    Raises: RuntimeError on every rank, before anything changes, when the averages cannot be read or do not match the
        model; on the first rank its cause is a CheckpointError. ValueError for an unknown ``kind`` or
        invalid ``steps``, and when ``ema`` has several tracks.
    Warns: UserWarning on the first rank when the next update replaces most of the averages by the live weights,
        and when frozen parameters in ``source`` differ from those of the model.
    """
    require_known(kind)
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"expected steps to be an integer >= 1, got {steps!r}")
    if len(ema.tracks) != 1:
        raise ValueError(f"expected a ShardedEMA with one track, got the tracks {ema.tracks}: give it one")
    state = ema.state_dict(for_loading=True)
    (track_name,) = state["tracks"]
    track = state["tracks"][track_name]
    layout = Layout(ema.model, "copy")
    changed: list[str] = []

    def read_state() -> Mapping[str, Any]:
        foreign = open_averages(Path(source), kind).with_steps(steps)
        needed = [*track["averages"], *track["buffers"]]
        model = Reference.of_layout(layout, set(needed))
        resolved = resolve(foreign, model)
        changed.extend(_changed_frozen(resolved, layout, model.frozen))
        missing = [name for name in needed if name not in resolved.averages.meta]
        filled = _filled(missing, None if reference is None else Path(reference), model, track["buffers"])
        tensors = replace(resolved, filled=filled).subset(needed)
        for note in foreign.notes:
            _log.info(note)
        if missing:
            _log.info(f"{len(missing)} tensors have no average in {foreign.path}: {abbreviated(missing)}")
        sections = {section: _Tensors(tensors, list(track[section])) for section in ("averages", "buffers")}
        return make_ema_state(sections, track_name, foreign.counts)

    ema.load_consolidated_state_dict(_State(read_state))
    if changed:
        warn_caller(
            f"frozen parameters of the model differ from those in {source}, and are not imported: "
            f"{abbreviated(changed)}; load the weights with which the averages were trained into the model"
        )


def _changed_frozen(resolved: ResolvedAverages, layout: Layout, unaveraged: Collection[str]) -> list[str]:
    """The frozen parameters whose part on this rank differs from the imported values by more than rounding."""
    changed: list[str] = []
    for name, shard in layout.parameters.items():
        if name not in unaveraged or name not in resolved.averages.meta or shard.owner.requires_grad:
            continue
        stored = shard.slice_full(next(resolved.read([name]))).cpu().double()
        if not torch.allclose(stored, shard.local.cpu().double(), rtol=0.01, equal_nan=True):
            changed.append(name)
    return changed


def _filled(names: list[str], reference: Path | None, model: Reference, buffers: Mapping[str, Tensor]) -> NamedTensors:
    """Values for tensors without an average: from the reference, or else the current buffers.

    Raises: CheckpointError when a value is missing or has another shape.
    """
    stored = NamedTensors({}, lambda _names: iter(())) if reference is None else Reference.of_files(reference).tensors
    current = {name: buffer for name, buffer in buffers.items() if not is_sharded(buffer)}
    if without := [name for name in names if name not in stored.meta and name not in current]:
        raise CheckpointError(
            f"{len(without)} of {len(model.tensors.meta)} tensors of the model have no average"
            f"{'' if reference is None else f' and are not in {reference}'}: {abbreviated(without)}; pass a "
            "reference that has them (reference=...)"
        )
    meta = {name: stored.meta.get(name, model.tensors.meta[name]) for name in names}
    if mismatches := [name for name, tensor in meta.items() if tensor.shape != model.tensors.meta[name].shape]:
        first = mismatches[0]
        raise CheckpointError(
            f"{reference} and the model differ in the shapes of {abbreviated(mismatches)}: {first} is "
            f"{tuple(meta[first].shape)}, and {tuple(model.tensors.meta[first].shape)} in the model"
        )

    def read(wanted: Iterable[str]) -> Iterator[Tensor]:
        for name in wanted:
            yield next(stored.read([name])) if name in stored.meta else current[name].cpu()

    return NamedTensors(meta, read)


class _Tensors(Mapping[str, Tensor]):
    """Some of the imported tensors, each read on access."""

    def __init__(self, resolved: ResolvedAverages, names: list[str]) -> None:
        self._resolved = resolved
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        return next(self._resolved.read([name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _State(Mapping[str, Any]):
    """A state that is read on first access. Only the first rank accesses it, so an error there reaches every rank."""

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make = make

    @cached_property
    def _state(self) -> Mapping[str, Any]:
        return self._make()

    def __getitem__(self, key: str) -> Any:
        return self._state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
