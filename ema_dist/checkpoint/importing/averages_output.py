"""A DCP folder with imported averages, which `checkpoint.load` loads into a `ShardedEMA`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.averages.state import STATE_FORMAT
from ema_dist.checkpoint.importing.foreign_averages import Counts
from ema_dist.checkpoint.manifest import Manifest
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint
from ema_dist.checkpoint.weighted_sum.output_formats import DCPOutput
from ema_dist.checkpoint.weighted_sum.source import CheckpointSource, WeightSource
from ema_dist.checkpoint.weighted_sum.weighted_sum import WeightedSum
from ema_dist.schedules.decay import DEFAULT_TRACK

EMA_KEY = "ema"
"""The key under which `checkpoint.load` loads the averages."""


class AveragesOutput(DCPOutput):
    """A DCP folder that `checkpoint.load` loads under the key ``ema``.

    Args:
        weights: the averages and the buffers.
        buffers: the names of the buffers.
    """

    def __init__(
        self, weights: WeightedSum, buffers: Collection[str], counts: Counts, group: ProcessGroup | None
    ) -> None:
        super().__init__(weights, counts.steps, group)
        self._buffers = buffers
        self._counts = counts
        # In the order in which DCP asks for them, so that only one is in memory at a time.
        self._names.sort(key=lambda name: name in buffers)

    def open(self, folder: Path) -> WeightSource:
        stored = StoredCheckpoint(folder)
        return CheckpointSource(stored, stored.weights("ema", entry=EMA_KEY))

    def _make_state(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        track: dict[str, Any] = make_track(tensors, self._buffers)
        if self._rank != 0:
            return {EMA_KEY: {"tracks": {DEFAULT_TRACK: track}}}
        return {EMA_KEY: make_ema_state(track, DEFAULT_TRACK, self._counts)}

    def _dcp_name(self, name: str) -> str:
        return f"{EMA_KEY}.tracks.{DEFAULT_TRACK}.{_section(name, self._buffers)}.{name}"

    def _make_manifest(self) -> Manifest:
        return Manifest(self._step, world_size=self._num_ranks)


def make_track(tensors: dict[str, Tensor], buffers: Collection[str]) -> dict[str, Any]:
    """The tensors as one track in a state of `ShardedEMA`."""
    sections: dict[str, dict[str, Tensor]] = {"averages": {}, "buffers": {}}
    for name, tensor in tensors.items():
        sections[_section(name, buffers)][name] = tensor
    return sections


def make_ema_state(track: Mapping[str, Any], name: str, counts: Counts) -> dict[str, Any]:
    """A state of `ShardedEMA` with one track of this name."""
    track_state = {"decay": counts.record().state(), **track}
    return {
        "format": STATE_FORMAT,
        "steps": counts.steps,
        "updates": counts.updates,
        "tracks": {name: track_state},
    }


def _section(name: str, buffers: Collection[str]) -> str:
    return "buffers" if name in buffers else "averages"
