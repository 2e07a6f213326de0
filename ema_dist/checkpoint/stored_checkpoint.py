"""One checkpoint as a process without a process group sees it: what is in it, and its weights by stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ema_dist.averages.state import FORMAT
from ema_dist.checkpoint.dcp.index import Outline, Track, dotted
from ema_dist.checkpoint.dcp.metadata import read_metadata
from ema_dist.checkpoint.dcp.reader import read
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.manifest import Manifest, read_manifest
from ema_dist.checkpoint.values import Path as Place
from ema_dist.checkpoint.values import nested, restored
from ema_dist.checkpoint.weights.casts import cast
from ema_dist.kernels import checksum
from ema_dist.messages import few
from ema_dist.schedules.decay import Constant, Decay, HalfLife, decay_from_half_life, half_life_from_decay

Which = Literal["ema", "live"]

BATCH_BYTES = 16 * 2**20
"""Smaller tensors are read together up to so many bytes: each call of the reader costs."""


@dataclass(frozen=True)
class SavedDecay:
    """The decay of one track as a checkpoint records it, without the interval at which averages were taken."""

    decay: Decay

    @property
    def unit(self) -> Literal["step", "update"]:
        """What `per_unit` and `half_life` count: optimizer steps, or averages taken."""
        return "step" if isinstance(self.decay, HalfLife) else "update"

    @property
    def per_unit(self) -> float:
        """The factor of the old average."""
        return decay_from_half_life(self.decay.steps) if isinstance(self.decay, HalfLife) else self.decay.value

    @property
    def half_life(self) -> float:
        """How many leave half of the old average."""
        return self.decay.steps if isinstance(self.decay, HalfLife) else half_life_from_decay(self.decay.value)


@dataclass(frozen=True)
class Averages:
    """A state of `ShardedEMA` in a checkpoint."""

    place: Place
    steps: int
    updates: int
    tracks: dict[str, Track]
    decays: dict[str, SavedDecay]

    @property
    def stale(self) -> bool:
        """Whether steps were seen, and no average taken: these are the weights that they began with, or followed."""
        return self.steps > 0 and self.updates == 0


@dataclass(frozen=True)
class Weights:
    """The weights of one model: where each lies in the checkpoint, and the dtype that it shall have."""

    sources: dict[str, tuple[str, torch.dtype]]
    without_average: list[str] = field(default_factory=list)
    """Names that have their live values among averages."""
    guessed_ties: dict[str, str] = field(default_factory=dict)
    """Names that have the average of another one, because their live values are equal and no manifest tells."""
    extra_states: dict[str, dict[Place, str]] = field(default_factory=dict)
    """What is no tensor, by name: the DCP names of its parts."""
    averages: Averages | None = None
    """Where averages come from."""
    alone: bool = False
    """Whether the checkpoint holds no live model of its averages."""

    def only(self, names: Iterable[str]) -> Weights:
        """The tensors of these names, in this order."""
        return replace(self, sources={name: self.sources[name] for name in names}, extra_states={})


class Stored:
    """What one folder of a checkpoint holds; nothing in it is run, and tensors are read when they are asked for.

    Raises: CheckpointError when it is none, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest | None = read_manifest(folder)
        self._metadata = read_metadata(folder)
        self.outline = Outline(self._metadata)

    @cached_property
    def averages(self) -> dict[Place, Averages]:
        """The states of `ShardedEMA` in it, by place.

        Raises: CheckpointError for one of another format.
        """
        return {place: self._averages(place) for place in self.outline.averages}

    def weights(
        self, which: Which, *, track: str | None = None, entry: str | None = None, dtype: torch.dtype | None = None
    ) -> Weights:
        """Which tensors make up a model: its averages, and what has none from the live model; or all from the latter.

        Args:
            track: of the averages; None for the only one, or the one called ``default``.
            entry: dotted name of the entry of the model or of its averages, where the checkpoint holds several.
            dtype: of floating tensors; None for that of each live one.

        Raises: CheckpointError when there are no such weights, or when averages and model do not fit.
        """
        place, model = self._choose(which, entry)
        tensors: dict[str, str] = {} if model is None else self.outline.models[model]
        found: dict[str, dict[Place, str]] = {} if model is None else self.outline.extra_states(model)
        states = {name: parts for name, parts in found.items() if name not in tensors}
        if which == "live" or place is None:
            return Weights({name: self._source(it, it, dtype) for name, it in tensors.items()}, extra_states=states)
        averages = self.averages[place]
        chosen = self._track(averages, track)
        if model is None:
            sources = {name: self._source(it, it, dtype) for name, it in chosen.all.items()}
            return Weights(sources, averages=averages, alone=True)
        if lost := self.unfit(chosen, tensors):
            raise CheckpointError(
                f"{self.folder}: the averages in {dotted(place)!r} and the model in {dotted(model)!r} differ: {lost}"
            )
        ties = self._ties(model, chosen)
        averaged = self._averaged(model, chosen, ties)
        return Weights(
            {name: self._source(averaged.get(name, live), live, dtype) for name, live in tensors.items()},
            without_average=[name for name in tensors if name not in averaged],
            guessed_ties={} if self.manifest else ties,
            extra_states=states,
            averages=averages,
        )

    def models_of(self, averages: Place) -> list[Place]:
        """The models whose averages these may be: the one that the manifest tells, else all whose names fit best."""
        told = self.manifest.models.get(dotted(averages)) if self.manifest else None
        return [it for it in self.outline.models if dotted(it) == told] or self.outline.models_of(averages)

    def averages_for(self, model: Place, track: Track) -> dict[str, str]:
        """The DCP name of the average of each tensor of a model that has one, in the model's order.

        Averages are stored under the first name of a tied tensor. Which second names there are, a manifest tells; in a
        checkpoint without one, a matrix counts as tied to the averaged one that has the same live values, to the bit.

        Raises: CheckpointError when the manifest ties tensors of different shapes.
        """
        return self._averaged(model, track, self._ties(model, track))

    def unfit(self, track: Track, tensors: Mapping[str, str]) -> dict[str, Any]:
        """Averages that the model with these tensors has none for, or of another shape or kind; empty if they fit."""
        averaged = track.all
        missing = sorted(averaged.keys() - tensors.keys())
        shapes = {
            name: (tuple(self.outline.shape(tensors[name])), tuple(self.outline.shape(it)))
            for name, it in averaged.items()
            if name in tensors and self.outline.shape(it) != self.outline.shape(tensors[name])
        }
        kinds = sorted(
            name
            for name, it in averaged.items()
            if name in tensors and self.outline.is_floating_point(it) != self.outline.is_floating_point(tensors[name])
        )
        found = {
            "names that the model lacks": missing,
            "shapes (model, average)": shapes,
            "floating on one side only": kinds,
        }
        return {what: where for what, where in found.items() if where}

    def values(self, dcp_names: Iterable[str]) -> dict[str, Any]:
        """Values by DCP name, tensors among them on the CPU.

        Raises: CheckpointError for one that could not be read without running code.
        """
        wanted: dict[str, Any] = dict.fromkeys(dcp_names)
        read(self.folder, wanted, metadata=self._metadata)
        return wanted

    def stream(
        self, dcp_names: Iterable[str], *, on_bytes: Callable[[int], object] = lambda _: None
    ) -> Iterator[Tensor]:
        """These tensors in this order, full, on the CPU, each its own.

        Args:
            on_bytes: called with the number of bytes read since the last call.

        Memory: `BATCH_BYTES`, or one larger tensor, and one stored piece, beyond those handed out.
        """
        for batch in self._batches(dcp_names):
            tensors = self.values(batch)
            for name in batch:
                on_bytes(self.outline.nbytes(name))
                yield tensors.pop(name)

    def read_weights(
        self, weights: Weights, *, on_bytes: Callable[[int], object] = lambda _: None
    ) -> Iterator[tuple[str, Tensor]]:
        """The names and full CPU tensors of `weights`, in the model's order, without extra states.

        Memory: as `stream`, and a cast one.
        Raises: CheckpointError when a finite value is beyond the range of the dtype that it shall have.
        """
        tensors = self.stream([source for source, _ in weights.sources.values()], on_bytes=on_bytes)
        for (name, (_, dtype)), tensor in zip(weights.sources.items(), tensors, strict=True):
            yield name, cast(name, tensor, dtype)

    def shapes(self, weights: Weights) -> dict[str, Tensor | None]:
        """What `read_weights` will give, on the meta device; None for what is no tensor."""
        tensors = {
            name: torch.empty(self.outline.shape(source), dtype=dtype, device="meta")
            for name, (source, dtype) in weights.sources.items()
        }
        return {**tensors, **dict.fromkeys(weights.extra_states)}

    def extra_state(self, parts: Mapping[Place, str]) -> Any:
        """One extra state of a module, as it was saved."""
        found = self.values(parts.values())
        return restored(nested({place: found[name] for place, name in parts.items()}))

    def _ties(self, model: Place, track: Track) -> dict[str, str]:
        """Second names of tied tensors of a model, and the first name of each."""
        if self.manifest:
            return self.manifest.ties.get(dotted(model), {})
        return self._alike(self.outline.models[model], track)

    def _averaged(self, model: Place, track: Track, ties: Mapping[str, str]) -> dict[str, str]:
        tensors, averaged = self.outline.models[model], track.all
        sources = {name: averaged.get(ties.get(name, name)) for name in tensors}
        found = {name: average for name, average in sources.items() if average is not None}
        if lost := self.unfit(Track({name: found[name] for name in ties.keys() & found}), tensors):
            raise CheckpointError(f"{self.folder}: its {dotted(model)!r} ties tensors that differ: {lost}")
        return found

    def _alike(self, tensors: Mapping[str, str], track: Track) -> dict[str, str]:
        """The matrices without an average, and the averaged one that each equals."""
        kinds = {name: (self.outline.shape(it), self.outline.dtype(it)) for name, it in tensors.items()}
        firsts = [name for name in track.averages if name in kinds]
        averaged = {kinds[name] for name in firsts}
        bare = [name for name, kind in kinds.items() if name not in track.all and len(kind[0]) > 1 and kind in averaged]
        wanted = {kinds[name] for name in bare}
        firsts = [name for name in firsts if kinds[name] in wanted]
        names = [*firsts, *bare]
        sums = [checksum(live).item() for live in self.stream(tensors[name] for name in names)]
        keys = dict(zip(names, zip(sums, (kinds[name] for name in names), strict=True), strict=True))
        first_of = {keys[name]: name for name in firsts[::-1]}
        return {name: first_of[keys[name]] for name in bare if keys[name] in first_of}

    def _batches(self, names: Iterable[str]) -> Iterator[list[str]]:
        batch: list[str] = []
        total = 0
        for name in names:
            if batch and (total + self.outline.nbytes(name) > BATCH_BYTES or name in batch):
                yield [*batch]
                batch.clear()
                total = 0
            batch.append(name)
            total += self.outline.nbytes(name)
        if batch:
            yield batch

    def _source(self, source: str, live: str, dtype: torch.dtype | None) -> tuple[str, torch.dtype]:
        own = self.outline.dtype(source)
        return source, (dtype or self.outline.dtype(live)) if own.is_floating_point else own

    def _track(self, averages: Averages, track: str | None) -> Track:
        tracks = averages.tracks
        wanted = track or (next(iter(tracks)) if len(tracks) == 1 else "default")
        if wanted not in tracks:
            raise CheckpointError(
                f"{self.folder}: expected a track {wanted!r}, found {sorted(tracks)}; choose one of these"
            )
        return tracks[wanted]

    def _choose(self, which: Which, entry: str | None) -> tuple[Place | None, Place | None]:
        """The places of the averages and of the model that are meant."""
        outline = self.outline
        pairs = [(averages, model) for averages in outline.averages for model in self.models_of(averages) or [None]]
        paired = {model for _, model in pairs}
        alone = [(None, model) for model in outline.models if model not in paired]
        named = [pair for pair in [*pairs, *alone] if entry in {None, *(dotted(it) for it in pair if it is not None)}]
        fitting = [pair for pair in named if pair[which == "live"] is not None]
        chosen = [pair for pair in fitting if pair[0] is not None] or fitting
        if which == "live":
            chosen = [(None, model) for model in dict.fromkeys(model for _, model in chosen)]
        if len(chosen) == 1:
            return chosen[0]
        found = ", ".join(f"{kind} {dotted(place)!r}" for place, kind in outline.entries()) or "nothing"
        if chosen:
            raise CheckpointError(f"several entries of {self.folder} could be meant: choose one by --entry, of {found}")
        wanted = ("averages" if which == "ema" else "a model") + (f" in an entry {entry!r}" if entry else "")
        raise CheckpointError(
            f"expected {wanted} in {self.folder}, found {found}"
            + ("; --weights live takes live weights" if which == "ema" and outline.models else "")
        )

    def _averages(self, place: Place) -> Averages:
        names = {at: name for name, at in self.outline.paths.items()}
        tracks = self.outline.averages[place]
        keys = {key: (*place, key) for key in ("format", "steps", "updates")}
        for track in tracks:
            keys |= {f"{track} {key}": (*place, "tracks", track, "decay", key) for key in ("kind", "value")}
        where = f"{self.folder}: the averages in {dotted(place)!r}"
        if missing := [dotted(at) for at in keys.values() if at not in names]:
            raise CheckpointError(f"{where} lack {few(missing)}")
        stored = self.values(names[at] for at in keys.values())
        found = {key: stored[names[at]] for key, at in keys.items()}
        if type(found["format"]) is not int or found["format"] != FORMAT:
            raise CheckpointError(f"{where} have format {found['format']!r}, expected {FORMAT}")
        try:
            decays = {track: _decay(found[f"{track} kind"], found[f"{track} value"]) for track in tracks}
            return Averages(place, int(found["steps"]), int(found["updates"]), tracks, decays)
        except (
            TypeError,
            ValueError,
            OverflowError,
            RuntimeError,
        ) as error:  # the latter of a tensor that is no number
            raise CheckpointError(f"{where} are damaged: {error}") from None


def _decay(kind: object, value: object) -> SavedDecay:
    if not isinstance(value, int | float):
        raise ValueError(f"expected a number as the decay, got {value!r}")
    match kind:
        case "half_life":
            return SavedDecay(HalfLife(value))
        case "constant":
            return SavedDecay(Constant(value))
    raise ValueError(f"expected a decay of the kind half_life or constant, got {kind!r}")
