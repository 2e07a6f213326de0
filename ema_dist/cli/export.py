"""``ema-dist export``: writes the averaged or live weights of a checkpoint into files that other programs load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.find_checkpoint import find_checkpoint
from ema_dist.checkpoint.manifest import verify_files
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint, WeightsKind
from ema_dist.checkpoint.weighted_sum.source import CheckpointSource
from ema_dist.checkpoint.weighted_sum.weighted_sum import Term, WeightedSum
from ema_dist.checkpoint.weights.config_files import config_files
from ema_dist.checkpoint.weights.export_layouts import LAYOUTS, ExportLayout, LayoutName
from ema_dist.checkpoint.weights.formats import FORMATS, FileFormat
from ema_dist.checkpoint.weights.weight_writer import WeightWriter
from ema_dist.cli.terminal import print_files, print_json, print_stderr, progress

MAX_SHARD_SIZE = "5GiB"
"""The default maximum size of files."""

ONE_FILE = 2**62
"""A maximum size of files that no model reaches."""


@dataclass(frozen=True)
class Destination:
    """Where weights are exported, and into what files."""

    folder: Path
    max_shard_size: int | str | None = None
    """None for `MAX_SHARD_SIZE`, or for one file if the library reads only one."""
    file_format: FileFormat | None = None
    """None for safetensors, or for the format that the library reads."""
    name: str | None = None
    """The file name; if there are several files, they and their index are named after it. None for the format's."""
    config: Path | None = None
    """A folder from which configuration and tokenizer are copied into `folder`."""
    force: bool = False
    """Whether to overwrite files by others."""
    layout: LayoutName | None = None
    """The library that will load the files; None for the Hugging Face layout."""

    @property
    def expected(self) -> ExportLayout:
        """What the library expects."""
        return ExportLayout() if self.layout is None else LAYOUTS[self.layout]

    @property
    def actual_format(self) -> FileFormat:
        """The format to write."""
        return self.file_format or self.expected.file_format or "safetensors"

    def require_consistent(self) -> None:
        """Raise ValueError when an option was given that the layout decides."""
        if self.layout is None:
            return
        decided = {
            "--name": self.name,
            "--max-shard-size": self.max_shard_size if self.expected.has_one_file else None,
            "--format": self.file_format if self.expected.file_format else None,
        }
        if given := [f"{option} {value}" for option, value in decided.items() if value is not None]:
            raise ValueError(f"--layout {self.layout} decides this itself: leave out {' and '.join(given)}")

    def open_writer(self, planned: Mapping[str, Tensor | None]) -> WeightWriter:
        """Return a writer of these entries. Raises: as `WeightWriter`, and CheckpointError without configuration."""
        return WeightWriter(
            self.folder,
            planned=planned,
            max_shard_size=self.max_shard_size or (ONE_FILE if self.expected.has_one_file else MAX_SHARD_SIZE),
            file_format=self.actual_format,
            name=self.name if self.layout is None else self.expected.file_name(self.actual_format),
            copied=[] if self.config is None else config_files(self.config),
            force=self.force,
        )


def export(
    checkpoint: Path,
    destination: Destination,
    *,
    weights_kind: WeightsKind = "ema",
    dtype: str | None = None,
    step: int | None = None,
    track: str | None = None,
    entry: str | None = None,
    as_json: bool = False,
) -> None:
    """Writes the weights in a checkpoint into files in a folder, and prints their paths and sizes.

    Args:
        checkpoint: a root of checkpoints, one of its steps, or a folder that ``dcp.save`` wrote.
        dtype: the name in torch of a floating dtype, to which floating tensors are cast.

    Memory: one output file and one tensor.
    Raises: CheckpointError when the checkpoint is damaged or has no such weights, OSError when the folder cannot be
        written; no file is left in it then. ValueError for choices that exclude each other.
    """
    destination.require_consistent()
    layout = destination.expected
    if layout.count_name and weights_kind == "live":
        raise ValueError(f"--layout {destination.layout} is for averages: leave out --weights live")
    stored = StoredCheckpoint(find_checkpoint(checkpoint, step))
    cast_dtype = None if dtype is None else getattr(torch, dtype)
    source = CheckpointSource(stored, stored.weights(weights_kind, track=track, entry=entry, dtype=cast_dtype))
    for caveat in source.caveats:
        print_stderr(caveat)
    weights = WeightedSum([Term(source, 1.0)])
    keeps_non_tensors = FORMATS[destination.actual_format].keeps_non_tensors
    counts = layout.counts(source.selection.averages.updates if source.selection.averages else 0)
    writer = destination.open_writer(
        {**{name: count.to("meta") for name, count in counts.items()}, **layout.renamed(weights.planned)}
    )
    with writer:
        for name, count in counts.items():
            writer.add(name, count)
        with progress("exporting", weights.input_nbytes) as advance:
            for name, value in weights.entries(
                weights.planned if keeps_non_tensors else weights.meta_tensors, on_bytes=advance
            ):
                _add(writer, layout.prefix + name, value)
        # Before the block ends, which publishes the files; the disk still writes the last one meanwhile.
        _require_intact(stored)
    sizes = {str(path): path.stat().st_size for path in [*writer.paths, *writer.copied_paths]}
    if as_json:
        print_json({"checkpoint": str(stored.folder), "files": sizes, "notes": source.caveats})
        return
    print_files(sizes)


def _require_intact(stored: StoredCheckpoint) -> None:
    """Raises: CheckpointError when the checksum of one of the checkpoint's files differs from the manifest."""
    files = stored.manifest.files if stored.manifest else {}
    with progress("checksums", sum(record.size for record in files.values())) as advance:
        if problems := verify_files(stored.folder, files, on_bytes=advance):
            raise CheckpointError(f"the checkpoint is damaged, nothing is exported: {'; '.join(problems)}")


def _add(writer: WeightWriter, name: str, value: object) -> None:
    """Adds an entry; an error of the file system, which may name no file, is raised again with the folder."""
    try:
        writer.add(name, value)
    except OSError as error:
        raise OSError(f"{writer.folder} cannot be written (is the disk full?): {error}") from error
