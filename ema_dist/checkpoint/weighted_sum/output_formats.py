"""The outputs of a weighted sum of checkpoints: files of weights, or a DCP folder; several processes may share one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from ema_dist.checkpoint.agreement import rank_and_size
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.manifest import Manifest, share_of_rank
from ema_dist.checkpoint.planner import SavePlanner
from ema_dist.checkpoint.saving import describe_failures
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint
from ema_dist.checkpoint.values import pack_value
from ema_dist.checkpoint.weighted_sum.source import CheckpointSource, FileSource, WeightSource
from ema_dist.checkpoint.weighted_sum.weighted_sum import WeightedSum
from ema_dist.checkpoint.weights.formats import FORMATS, WRITER_MARK, FileFormat
from ema_dist.checkpoint.weights.sharded_files import ShardedFiles, size_in_bytes
from ema_dist.checkpoint.writer import CheckpointWriter
from ema_dist.messages import abbreviated

MODEL_KEY = "model"
"""The key under which `checkpoint.load` finds the model in a DCP folder."""


class WeightOutput(ABC):
    """Files for the tensors of a sum, each written by one process.

    Args:
        group: the processes that share the work; None for one.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self._group = group
        self._rank, self._num_ranks = rank_and_size(group)

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The tensors and extra states that this process writes, in this order."""

    @abstractmethod
    def write(self, folder: Path, entries: Iterator[tuple[str, Any]]) -> None:
        """Write the entries of `names`.

        Collective: over the group. Raises: CheckpointError or OSError when the files cannot be written.
        """

    @abstractmethod
    def finish(self) -> None:
        """Writes the index after all ranks have written their files. Called on the first rank."""

    @abstractmethod
    def open(self, folder: Path) -> WeightSource:
        """Open what was written. Raises: CheckpointError when it cannot be read."""


class HuggingFaceOutput(WeightOutput):
    """Files by safetensors or ``torch.save`` in the Hugging Face layout; each process writes some of them."""

    def __init__(
        self, weights: WeightedSum, file_format: FileFormat, max_shard_size: int | str, group: ProcessGroup | None
    ) -> None:
        super().__init__(group)
        total = sum(meta.nbytes for meta in weights.meta_tensors.values())
        # At least one file for each process, if the tensors are small enough.
        size = max(1, min(size_in_bytes(max_shard_size), ceil(total / self._num_ranks)))
        self._files = ShardedFiles(weights.planned, FORMATS[file_format], max_shard_size=size)
        nbytes = {
            file: sum(meta.nbytes for name in names if (meta := weights.planned[name]) is not None)
            for file, names in self._files.names_by_file.items()
        }
        self._share = set(share_of_rank(nbytes, self._rank, self._num_ranks))

    @property
    def names(self) -> list[str]:
        return [name for file, names in self._files.names_by_file.items() if file in self._share for name in names]

    def write(self, folder: Path, entries: Iterator[tuple[str, Any]]) -> None:
        self._files.start(folder, WRITER_MARK)
        try:
            for name, value in entries:
                self._files.add(name, value)
                del value  # as in `WeightedSum.entries`
            assert not self._files.missing(self._share), "entries has all of `names`"
            self._files.wait()
        finally:
            self._files.close()

    def finish(self) -> None:
        self._files.write_index(WRITER_MARK)

    def open(self, folder: Path) -> WeightSource:
        return FileSource(folder)


class DCPOutput(WeightOutput):
    """A folder that `checkpoint.load` takes under the key ``model``; each process writes one file."""

    def __init__(self, weights: WeightedSum, step: int | None, group: ProcessGroup | None) -> None:
        super().__init__(group)
        self._weights = weights
        self._step = step or 0
        sizes = {name: meta.nbytes for name, meta in weights.meta_tensors.items()}
        share = set(share_of_rank(sizes, self._rank, self._num_ranks))
        self._names = [name for name in weights.meta_tensors if name in share]
        base = weights.base
        # Read here, because the collectives in `write` would wait for a rank that cannot read one.
        self._extra_states = {name: pack_value(base.extra_state(name), name) for name in base.extra_states}

    @property
    def names(self) -> list[str]:
        return self._names

    def write(self, folder: Path, entries: Iterator[tuple[str, Any]]) -> None:
        state = self._make_state({name: self._weights.meta_tensors[name] for name in self._names})
        dcp_entries = ((self._dcp_name(name), tensor) for name, tensor in entries)
        planner = _StreamPlanner(state, dcp_entries, self._group)
        writer = _StreamWriter(folder, self._make_manifest(), planner, commit=_do_nothing)
        try:
            dcp.save(state, storage_writer=writer, planner=planner, process_group=self._group)
        except CheckpointException as error:
            for failure, _ in error.failures.values():
                if isinstance(failure, (KeyboardInterrupt, SystemExit)):  # DCP collects these too
                    raise failure from error
            raise CheckpointError(f"{folder} cannot be written: {describe_failures(error)}") from error

    def finish(self) -> None:
        """Do nothing: `write` has written the metadata and the manifest."""

    def open(self, folder: Path) -> WeightSource:
        stored = StoredCheckpoint(folder)
        return CheckpointSource(stored, stored.weights("live", entry=MODEL_KEY))

    def _make_state(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """What this process saves, with its tensors on the meta device."""
        return {MODEL_KEY: tensors | (self._extra_states if self._rank == 0 else {})}

    def _dcp_name(self, name: str) -> str:
        """The name under which DCP saves a tensor."""
        return f"{MODEL_KEY}.{name}"

    def _make_manifest(self) -> Manifest:
        return Manifest(
            self._step,
            world_size=self._num_ranks,
            layouts={MODEL_KEY: "full tensors, a weighted sum of checkpoints"},
            ties={MODEL_KEY: self._weights.ties},
        )


class _StreamPlanner(SavePlanner):
    """Plans tensors on the meta device, and takes their values, by DCP name, from an iterator when they are written."""

    def __init__(
        self, state_dict: dict[str, Any], entries: Iterator[tuple[str, Any]], group: ProcessGroup | None
    ) -> None:
        super().__init__(state_dict, group)
        self._entries = entries
        self._pending: dict[str, Tensor] = {}
        self._last_written: Tensor | None = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = super().lookup_object(index)
        if not (isinstance(value, Tensor) and value.is_meta):
            return value
        if self._last_written is not None:
            # torch keeps all tensors of a file until it is complete, which here would be the whole model.
            self._last_written.untyped_storage().resize_(0)
        while index.fqn not in self._pending:  # a tied tensor comes before its turn
            dcp_name, tensor = next(self._entries)
            self._pending[dcp_name] = tensor
        tensor = self._pending.pop(index.fqn)
        storage = tensor.untyped_storage()
        self._last_written = tensor if storage.resizable() and storage.nbytes() == tensor.nbytes else tensor.clone()
        return self._last_written


class _StreamWriter(CheckpointWriter):
    """Disables read-ahead, so that the next tensor is read only after the previous one is written."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.per_thread_copy_ahead = 0  # torch would also sort tensors by size, on a machine with a GPU


def _do_nothing(_folder: Path) -> None:
    """The caller renames the folder after more checks."""


def left_out_note(extra_states: Sequence[str], file_format: str) -> list[str]:
    """A note on the extra states that files in this format cannot hold; empty if there are none."""
    if not extra_states or file_format != "safetensors":
        return []
    note = (
        f"safetensors files cannot hold {len(extra_states)} extra states that are not tensors, so they are not "
        f'written: {abbreviated(extra_states)}. Use file_format="torch" or "dcp" (--format) to keep them'
    )
    return [note]


def make_output(
    weights: WeightedSum,
    file_format: str,
    *,
    max_shard_size: int | str,
    step: int | None,
    group: ProcessGroup | None,
) -> WeightOutput:
    """The output in a format: ``"safetensors"``, ``"torch"`` or ``"dcp"``.

    Raises: ValueError for any other format, and as `ShardedFiles`.
    """
    match file_format:
        case "dcp":
            return DCPOutput(weights, step, group)
        case "safetensors" | "torch":
            return HuggingFaceOutput(weights, file_format, max_shard_size, group)
    raise ValueError(f"expected file_format to be one of {abbreviated([*FORMATS, 'dcp'])}, got {file_format!r}")
