"""Writes imported averages into a new folder: weight files, or a DCP folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.importing.averages_output import AveragesOutput
from ema_dist.checkpoint.importing.detection import KindOrAuto, open_averages
from ema_dist.checkpoint.importing.foreign_averages import ForeignAverages
from ema_dist.checkpoint.importing.reference import Reference
from ema_dist.checkpoint.importing.resolution import ResolvedAverages, resolve
from ema_dist.checkpoint.weighted_sum.output_formats import WeightOutput
from ema_dist.checkpoint.weighted_sum.source import WeightSource
from ema_dist.checkpoint.weighted_sum.weighted_sum import Term, WeightedSum
from ema_dist.checkpoint.weighted_sum.write import write_weighted_sum
from ema_dist.messages import abbreviated

ImportFormat = Literal["safetensors", "dcp"]

RECORD_FILE = "import.json"
"""The file in the folder of imported averages that records their source."""


class ImportSource(WeightSource):
    """Imported averages, and the values of the reference for tensors without one."""

    def __init__(self, foreign: ForeignAverages, resolved: ResolvedAverages) -> None:
        super().__init__(foreign.path, foreign.counts.steps if foreign.counts.are_recorded else None, resolved.meta, ())
        self._resolved = resolved

    def read(self, names: Iterable[str]) -> Iterator[Tensor]:
        return self._resolved.read(names)

    def extra_state(self, name: str) -> Any:
        raise CheckpointError(f"{self.path}: {name!r} is not a tensor")


@dataclass(frozen=True)
class Import:
    """Averages of another package, ready to be written.

    Args:
        foreign: the averages as they are stored.
        resolved: the same averages under the names of the model.
        file_format: ``"safetensors"``, or ``"dcp"`` for a folder that `checkpoint.load` loads under the key ``ema``.
    """

    foreign: ForeignAverages
    resolved: ResolvedAverages
    file_format: ImportFormat

    @classmethod
    def open(
        cls,
        source: Path,
        kind: KindOrAuto,
        reference: Path | None,
        file_format: ImportFormat,
        *,
        steps: int | None = None,
    ) -> Import:
        """Open averages and check them against the reference model.

        Args:
            steps: how many steps the averages cover, for a source that does not record it.

        Raises: CheckpointError when they cannot be read, do not match, or need a reference that was not given;
            ValueError for an unknown kind.
        """
        foreign = open_averages(source, kind).with_steps(steps)
        model = None if reference is None else Reference.of_files(reference)
        resolved = resolve(foreign, model)
        if model is not None:
            resolved.notes.extend(model.notes)
        return cls(
            foreign,
            resolved if file_format == "safetensors" else _averages_of_ema(foreign, resolved, model),
            file_format,
        )

    @property
    def notes(self) -> list[str]:
        """What a user should know about the result."""
        return [*(self.foreign.notes if self.file_format == "dcp" else []), *self.resolved.notes]

    @property
    def input_nbytes(self) -> int:
        """The number of bytes that `write` reads."""
        return sum(meta.nbytes for meta in self.resolved.meta.values())

    @property
    def record(self) -> dict[str, Any]:
        """What `RECORD_FILE` says about the averages, in addition to the sources."""
        counts = self.foreign.counts
        return {
            "format": self.foreign.kind,
            "steps": counts.steps if counts.are_recorded else None,
            "updates": counts.updates if counts.are_recorded else None,
            "law": None if counts.law is None else repr(counts.law),
            "without_average": self.resolved.filled_names,
            "notes": self.notes,
        }

    def write(
        self, folder: str | os.PathLike[str], *, on_bytes: Callable[[int], object] = lambda _: None
    ) -> list[Path]:
        """Write into a new folder, verify it, and return its files. Raises: as `write_weighted_sum`."""
        weights = WeightedSum([Term(ImportSource(self.foreign, self.resolved), 1.0)])

        def make_output(group: ProcessGroup | None) -> WeightOutput:
            return AveragesOutput(weights, self.resolved.buffers or (), self.foreign.counts, group)

        return write_weighted_sum(
            weights,
            folder,
            call="ema-dist import",
            custom_output=make_output if self.file_format == "dcp" else None,
            record=self.record,
            record_name=RECORD_FILE,
            on_bytes=on_bytes,
        )


def _averages_of_ema(
    foreign: ForeignAverages, resolved: ResolvedAverages, reference: Reference | None
) -> ResolvedAverages:
    """The tensors that a `ShardedEMA` of the model holds: all but parameters that are known to be frozen."""
    if resolved.buffers is None:
        raise CheckpointError(
            f"{foreign.path} does not distinguish parameters from buffers, which a DCP folder stores separately: "
            "expected a reference model, model.state_dict() in a file by torch.save (--reference)"
        )
    if reference is None:
        return resolved
    trained = [
        name
        for name in resolved.meta
        if name in resolved.buffers
        or (name not in reference.frozen and (reference.marks_parameters or name in resolved.averages.meta))
    ]
    if resolved.buffers.issuperset(trained):
        raise CheckpointError(
            f"all parameters in {reference.label} are frozen, so a ShardedEMA of the model has no averages to resume "
            "from: expected a reference with parameters that require a gradient, or --format safetensors"
        )
    subset = resolved.subset(trained)
    if frozen := [name for name in resolved.meta if name not in subset.meta]:
        subset.notes.append(
            f"frozen parameters have no average in a ShardedEMA and are left out: {abbreviated(frozen)}"
        )
    if not reference.marks_parameters:
        subset.notes.append(
            f"{reference.label} does not mark its parameters, so integer tensors and running statistics count "
            "as buffers, and all others as trained parameters. If the model has other buffers or frozen parameters, "
            "save the reference by torch.save(model.state_dict(keep_vars=True), ...)"
        )
    return subset
