"""A checkpoint read by one process, without a process group: what it contains, and its weights one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ema_dist.averages.initial_weights import describe_stored
from ema_dist.averages.state import STATE_FORMAT
from ema_dist.checkpoint.dcp.checkpoint_index import CheckpointIndex, TrackNames, dotted_name
from ema_dist.checkpoint.dcp.metadata import read_metadata
from ema_dist.checkpoint.dcp.reader import read_entries
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.manifest import Manifest, read_manifest
from ema_dist.checkpoint.values import KeyPath, unflatten, unpack_value
from ema_dist.checkpoint.weights.casts import cast
from ema_dist.kernels import checksum
from ema_dist.messages import abbreviated
from ema_dist.schedules.clock import ClockState
from ema_dist.schedules.decay import DecayRecord, read_clock
from ema_dist.schedules.equations import decay_from_half_life, half_life_from_decay
from ema_dist.schedules.laws import Constant, HalfLife

WeightsKind = Literal["ema", "live"]

BATCH_BYTES = 16 * 2**20
"""Tensors are read in batches of at most this size, or one larger tensor: each call of the reader is costly."""


@dataclass(frozen=True)
class StoredDecay:
    """The law of one track as a checkpoint records it, without the interval at which averages were taken."""

    record: DecayRecord
    unit: Literal["step", "unit of time", "update"]
    """The unit of `decay_per_unit` and `half_life`: an update, if the law has no half-life."""
    decay_per_unit: float
    """The factor of the old average in one unit; at the last update, if the law has no half-life."""
    half_life: float | None
    """The number of units after which half of the old average is left; None for a law that has no half-life."""

    @classmethod
    def create(cls, record: DecayRecord, track: str, clock: ClockState) -> StoredDecay:
        """The law that a track records, while the clock shows ``clock``."""
        match record.make_law():
            case HalfLife(value=float() | int() as half_life, ramp=None):
                unit = "step" if clock.time == clock.steps else "unit of time"
                return cls(record, unit, decay_from_half_life(half_life), half_life)
            case Constant(value=decay):
                return cls(record, "update", decay, half_life_from_decay(decay))
        return cls(record, "update", float(clock.last_decays[track]), None)


@dataclass(frozen=True)
class StoredAverages:
    """A state of `ShardedEMA` in a checkpoint."""

    key_path: KeyPath
    clock: ClockState
    tracks: dict[str, TrackNames]
    decays: dict[str, StoredDecay]

    @property
    def steps(self) -> int:
        """Optimizer steps seen."""
        return int(self.clock.steps)

    @property
    def updates(self) -> int:
        """Updates made."""
        return int(self.clock.updates)

    def describe_initial_weights(self, track: str) -> str:
        """A note if more than 10 % of a track is still the initial weights; else empty."""
        return describe_stored(self.clock, track, self.decays[track].record.describe())


@dataclass(frozen=True)
class WeightSelection:
    """The weights of one model: for each tensor, its DCP name in the checkpoint and the dtype to cast it to."""

    sources: dict[str, tuple[str, torch.dtype]]
    without_average: list[str] = field(default_factory=list)
    """Names of tensors without an average, whose live values are selected instead."""
    ties: dict[str, str] = field(default_factory=dict)
    """The first name of each tied tensor by its other names, where these have the same values."""
    guessed_ties: dict[str, str] = field(default_factory=dict)
    """Names that get the average of another tensor, because no manifest lists ties and their live values are equal."""
    extra_states: dict[str, dict[KeyPath, str]] = field(default_factory=dict)
    """Extra states of modules, by name: the DCP names of their parts."""
    averages: StoredAverages | None = None
    """The state that the averages are from; None for live weights."""
    track: str = ""
    """The name of their track there."""
    is_model_missing: bool = False
    """Whether the checkpoint holds averages, but not the live model they belong to."""

    def subset(self, names: Iterable[str]) -> WeightSelection:
        """The tensors of these names, in this order."""
        return replace(self, sources={name: self.sources[name] for name in names}, extra_states={})


class StoredCheckpoint:
    """The contents of one checkpoint folder; tensors are read on access, and nothing in the folder is run.

    Raises: CheckpointError when the folder is not a checkpoint, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest | None = read_manifest(folder)
        self._metadata = read_metadata(folder)
        self.index: CheckpointIndex = CheckpointIndex(self._metadata)

    @cached_property
    def averages(self) -> dict[KeyPath, StoredAverages]:
        """The states of `ShardedEMA` in the checkpoint, by path.

        Raises: CheckpointError for a state of another format.
        """
        return {key_path: self._read_averages(key_path) for key_path in self.index.averages}

    def weights(
        self,
        weights_kind: WeightsKind,
        *,
        track: str | None = None,
        entry: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> WeightSelection:
        """Select the tensors of a model: its averages, and live values of tensors without one; or all live values.

        Args:
            track: the track of the averages; None for the only one, or the one called ``default``.
            entry: dotted name of the entry of the model or of its averages, if the checkpoint holds several.
            dtype: dtype of floating-point tensors; None for the dtype of each live tensor.

        Raises: CheckpointError when there are no such weights, or when averages and model do not match.
        """
        key_path, model = self._select_entries(weights_kind, entry)
        tensors: dict[str, str] = {} if model is None else self.index.models[model]
        stored_states: dict[str, dict[KeyPath, str]] = {} if model is None else self.index.extra_states(model)
        states = {name: parts for name, parts in stored_states.items() if name not in tensors}
        if weights_kind == "live" or key_path is None:
            return WeightSelection(
                {name: self._source_and_dtype(dcp_name, dcp_name, dtype) for name, dcp_name in tensors.items()},
                ties=self.manifest.ties.get(dotted_name(model), {}) if self.manifest and model is not None else {},
                extra_states=states,
            )
        averages = self.averages[key_path]
        track_name = self._select_track(averages, track)
        selected = averages.tracks[track_name]
        if model is None:
            sources = {
                name: self._source_and_dtype(dcp_name, dcp_name, dtype) for name, dcp_name in selected.all.items()
            }
            return WeightSelection(sources, averages=averages, track=track_name, is_model_missing=True)
        if mismatches := self.mismatches(selected, tensors):
            raise CheckpointError(
                f"{self.folder}: the averages in {dotted_name(key_path)!r} and the model in {dotted_name(model)!r} "
                f"do not match: {mismatches}"
            )
        ties = self._ties(model, selected)
        averaged = self._average_names(model, selected, ties)
        return WeightSelection(
            {name: self._source_and_dtype(averaged.get(name, live), live, dtype) for name, live in tensors.items()},
            without_average=[name for name in tensors if name not in averaged],
            ties=ties,
            guessed_ties={} if self.manifest else ties,
            extra_states=states,
            averages=averages,
            track=track_name,
        )

    def matching_models(self, averages: KeyPath) -> list[KeyPath]:
        """The models whose averages these may be: the one that the manifest names, or else those that match best."""
        recorded = self.manifest.models.get(dotted_name(averages)) if self.manifest else None
        models = [model for model in self.index.models if dotted_name(model) == recorded]
        return models or self.index.matching_models(averages)

    def average_names(self, model: KeyPath, track: TrackNames) -> dict[str, str]:
        """The DCP names of a model's averages, by the names of its tensors and in their order.

        An average is stored under the first name of a tied tensor. The manifest lists the other names. Without a
        manifest, a matrix counts as tied to an averaged one if their live values are bit-identical.

        Raises: CheckpointError when the manifest ties tensors of different shapes.
        """
        return self._average_names(model, track, self._ties(model, track))

    def mismatches(self, track: TrackNames, tensors: Mapping[str, str]) -> str:
        """Describe averages that the model lacks or has with another shape or kind of dtype; empty if all match."""
        averaged = track.all
        missing = sorted(averaged.keys() - tensors.keys())
        shapes = [
            f"{name} ({tuple(self.index.shape(tensors[name]))}, average {tuple(self.index.shape(average))})"
            for name, average in averaged.items()
            if name in tensors and self.index.shape(average) != self.index.shape(tensors[name])
        ]
        kinds = sorted(
            name
            for name, average in averaged.items()
            if name in tensors and self.index.is_floating_point(average) != self.index.is_floating_point(tensors[name])
        )
        by_reason = {
            "not in the model": missing,
            "of another shape": shapes,
            "floating-point in only one of the two": kinds,
        }
        return "; ".join(f"{reason}: {abbreviated(names)}" for reason, names in by_reason.items() if names)

    def read_values(self, dcp_names: Iterable[str], *, into: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Read values by DCP name, tensors on the CPU.

        Args:
            into: tensors to read into, for some of the names; new ones are allocated for the others.

        Raises: CheckpointError for a value that could not be read without running code.
        """
        values: dict[str, Any] = {**dict.fromkeys(dcp_names), **(into or {})}
        read_entries(self.folder, values, metadata=self._metadata)
        return values

    def stream(
        self, dcp_names: Iterable[str], *, on_bytes: Callable[[int], object] = lambda _: None
    ) -> Iterator[Tensor]:
        """Yield these tensors in this order, full and on the CPU; none of them share storage.

        Args:
            on_bytes: called with the number of bytes read since the last call.

        Memory: `BATCH_BYTES`, or one larger tensor, and one stored chunk, beside the tensors yielded before.
        """
        for batch in self._batches(dcp_names):
            tensors = self.read_values(batch)
            for name in batch:
                on_bytes(self.index.nbytes(name))
                yield tensors.pop(name)

    def read_weights(
        self, weights: WeightSelection, *, on_bytes: Callable[[int], object] = lambda _: None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and full CPU tensors of a selection, in the model's order, without extra states.

        Memory: as `stream`, and one cast tensor.
        Raises: CheckpointError when a finite value is beyond the range of the selected dtype.
        """
        tensors = self.stream([source for source, _ in weights.sources.values()], on_bytes=on_bytes)
        for (name, (_, dtype)), tensor in zip(weights.sources.items(), tensors, strict=True):
            yield name, cast(name, tensor, dtype)

    def meta_tensors(self, weights: WeightSelection) -> dict[str, Tensor | None]:
        """The tensors that `read_weights` will yield, on the meta device; None for extra states."""
        tensors = {
            name: torch.empty(self.index.shape(source), dtype=dtype, device="meta")
            for name, (source, dtype) in weights.sources.items()
        }
        return {**tensors, **dict.fromkeys(weights.extra_states)}

    def extra_state(self, parts: Mapping[KeyPath, str]) -> Any:
        """Read one extra state of a module."""
        loaded = self.read_values(parts.values())
        return unpack_value(unflatten({key_path: loaded[name] for key_path, name in parts.items()}))

    def _ties(self, model: KeyPath, track: TrackNames) -> dict[str, str]:
        """Second names of tied tensors of a model, and the first name of each."""
        if self.manifest:
            return self.manifest.ties.get(dotted_name(model), {})
        return self._guess_ties(self.index.models[model], track)

    def _average_names(self, model: KeyPath, track: TrackNames, ties: Mapping[str, str]) -> dict[str, str]:
        tensors, averaged = self.index.models[model], track.all
        sources = {name: averaged.get(ties.get(name, name)) for name in tensors}
        averages = {name: average for name, average in sources.items() if average is not None}
        tied = TrackNames({name: averages[name] for name in ties.keys() & averages})
        if mismatches := self.mismatches(tied, tensors):
            raise CheckpointError(f"{self.folder}: its {dotted_name(model)!r} ties tensors that differ: {mismatches}")
        return averages

    def _guess_ties(self, tensors: Mapping[str, str], track: TrackNames) -> dict[str, str]:
        """The matrices without an average, and for each the averaged matrix with the same live values."""
        signatures = {
            name: (self.index.shape(dcp_name), self.index.dtype(dcp_name)) for name, dcp_name in tensors.items()
        }
        candidates = [name for name in track.averages if name in signatures]
        averaged_signatures = {signatures[name] for name in candidates}
        unaveraged = [
            name
            for name, signature in signatures.items()
            if name not in track.all and len(signature[0]) > 1 and signature in averaged_signatures
        ]
        unaveraged_signatures = {signatures[name] for name in unaveraged}
        candidates = [name for name in candidates if signatures[name] in unaveraged_signatures]
        names = [*candidates, *unaveraged]
        checksums = [checksum(live).item() for live in self.stream(tensors[name] for name in names)]
        fingerprints = dict(zip(names, zip(checksums, (signatures[name] for name in names), strict=True), strict=True))
        first_names = {fingerprints[name]: name for name in candidates[::-1]}
        return {name: first_names[fingerprints[name]] for name in unaveraged if fingerprints[name] in first_names}

    def _batches(self, names: Iterable[str]) -> Iterator[list[str]]:
        batch: list[str] = []
        total = 0
        for name in names:
            if batch and (total + self.index.nbytes(name) > BATCH_BYTES or name in batch):
                yield [*batch]
                batch.clear()
                total = 0
            batch.append(name)
            total += self.index.nbytes(name)
        if batch:
            yield batch

    def _source_and_dtype(self, source: str, live: str, dtype: torch.dtype | None) -> tuple[str, torch.dtype]:
        stored_dtype = self.index.dtype(source)
        return source, (dtype or self.index.dtype(live)) if stored_dtype.is_floating_point else stored_dtype

    def _select_track(self, averages: StoredAverages, track: str | None) -> str:
        tracks = averages.tracks
        name = track or (next(iter(tracks)) if len(tracks) == 1 else "default")
        if name not in tracks:
            raise CheckpointError(
                f"{self.folder}: expected a track {name!r}, found {sorted(tracks)}; choose one of these"
            )
        return name

    def _select_entries(self, weights_kind: WeightsKind, entry: str | None) -> tuple[KeyPath | None, KeyPath | None]:
        """The paths of the averages and of the model to select from; None for either if there is none."""
        index = self.index
        pairs = [(averages, model) for averages in index.averages for model in self.matching_models(averages) or [None]]
        paired = {model for _, model in pairs}
        unpaired = [(None, model) for model in index.models if model not in paired]
        requested = [
            pair
            for pair in [*pairs, *unpaired]
            if entry in {None, *(dotted_name(path) for path in pair if path is not None)}
        ]
        fitting = [pair for pair in requested if pair[weights_kind == "live"] is not None]
        chosen = [pair for pair in fitting if pair[0] is not None] or fitting
        if weights_kind == "live":
            chosen = [(None, model) for model in dict.fromkeys(model for _, model in chosen)]
        if len(chosen) == 1:
            return chosen[0]
        available = ", ".join(f"{kind} {dotted_name(key_path)!r}" for key_path, kind in index.entries()) or "nothing"
        if chosen:
            raise CheckpointError(
                f"several entries of {self.folder} match: choose one with `entry` (--entry), from {available}"
            )
        expected = ("averages" if weights_kind == "ema" else "a model") + (f" in an entry {entry!r}" if entry else "")
        raise CheckpointError(
            f"expected {expected} in {self.folder}, found {available}"
            + ("; for its live weights, pass --weights live" if weights_kind == "ema" and index.models else "")
        )

    def _read_averages(self, key_path: KeyPath) -> StoredAverages:
        names = {leaf_path: name for name, leaf_path in self.index.key_paths.items()}
        tracks = self.index.averages[key_path]
        leaf_paths = {key: (*key_path, key) for key in ("format", "steps", "updates")}
        for track in tracks:
            leaf_paths |= {f"{track} {key}": (*key_path, "tracks", track, "decay", key) for key in ("kind", "value")}
        prefix = f"{self.folder}: the averages in {dotted_name(key_path)!r}"
        if missing := [dotted_name(leaf_path) for leaf_path in leaf_paths.values() if leaf_path not in names]:
            raise CheckpointError(f"{prefix} lack {abbreviated(missing)}")
        stored = self.read_values(names[leaf_path] for leaf_path in leaf_paths.values())
        fields = {key: stored[names[leaf_path]] for key, leaf_path in leaf_paths.items()}
        if type(fields["format"]) is not int or fields["format"] != STATE_FORMAT:
            raise CheckpointError(f"{prefix} have format {fields['format']!r}, expected {STATE_FORMAT}")
        try:
            records = {track: DecayRecord.parse(fields[f"{track} kind"], fields[f"{track} value"]) for track in tracks}
            clock = read_clock(records, steps=int(fields["steps"]), updates=int(fields["updates"]))
            decays = {track: StoredDecay.create(record, track, clock) for track, record in records.items()}
            return StoredAverages(key_path, clock, tracks, decays)
        # RuntimeError: int() of a tensor with several elements.
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"{prefix} are damaged: {error}") from None
