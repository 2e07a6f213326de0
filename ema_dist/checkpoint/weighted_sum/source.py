"""The full weights of a checkpoint, or of files of weights: names, shapes and dtypes, and values read on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_dist.checkpoint.dcp.checkpoint_index import EXTRA_STATE_SUFFIX, dotted_name
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.find_checkpoint import find_checkpoint, has_checkpoint, step_in_name
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint, WeightSelection, WeightsKind
from ema_dist.checkpoint.weighted_sum.buffer import ReusableBuffer
from ema_dist.checkpoint.weights.casts import cast
from ema_dist.checkpoint.weights.reader import WeightReader
from ema_dist.messages import abbreviated


class WeightSource(ABC):
    """Full weights that are read one at a time; nothing in their files is run.

    Args:
        path: their folder or file.
        step: the optimizer step at which they were saved, if known.
        meta_tensors: shape and dtype of each tensor, on the meta device, in the model's order. The dtype is that of
            the model's weight; an average may be stored in a wider one.
        extra_states: the names of values that are not tensors.
        ties: the first name of each tied tensor by its other names, which have the same values.
    """

    def __init__(
        self,
        path: Path,
        step: int | None,
        meta_tensors: Mapping[str, Tensor],
        extra_states: Iterable[str],
        ties: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.step = step
        self.meta_tensors: dict[str, Tensor] = dict(meta_tensors)
        self.extra_states: list[str] = list(extra_states)
        self.ties: dict[str, str] = dict(ties or {})

    @property
    def caveats(self) -> list[str]:
        """Warnings about these weights that a user should see."""
        return []

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored."""
        return self.meta_tensors[name].dtype

    def stored_nbytes(self, name: str) -> int:
        """The size of a tensor in bytes, as it is stored."""
        return self.meta_tensors[name].numel() * self.stored_dtype(name).itemsize

    @abstractmethod
    def read(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Yield these tensors in this order, full, on the CPU and as they are stored.

        Raises: CheckpointError when a tensor cannot be read.
        """

    def read_batch(self, names: Sequence[str], buffer: ReusableBuffer) -> Iterator[Tensor]:
        """Yield tensors as `read` does, perhaps in memory of ``buffer``, which the next batch overwrites."""
        del buffer
        return self.read(names)

    @abstractmethod
    def extra_state(self, name: str) -> Any:
        """Read one value that is not a tensor. Raises: CheckpointError when it cannot be read."""

    def read_cast(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Yield these tensors as `read` does, in the dtypes of `meta_tensors`.

        Raises: CheckpointError when a finite value is beyond the range of its dtype.
        """
        requested = list(names)
        for name, tensor in zip(requested, self.read(requested), strict=True):
            yield cast(name, tensor, self.meta_tensors[name].dtype)


class CheckpointSource(WeightSource):
    """The live weights or the averages in a folder that DCP wrote.

    Args:
        selection: selects the weights in ``stored``.
    """

    def __init__(self, stored: StoredCheckpoint, selection: WeightSelection) -> None:
        tensors = {name: meta for name, meta in stored.meta_tensors(selection).items() if meta is not None}
        step = stored.manifest.step if stored.manifest else step_in_name(stored.folder)
        ties = {name: first for name, first in selection.ties.items() if {name, first} <= tensors.keys()}
        super().__init__(stored.folder, step, tensors, selection.extra_states, ties)
        self.stored = stored
        self.selection = selection
        self._dcp_names = {name: dcp_name for name, (dcp_name, _) in selection.sources.items()}

    @property
    def caveats(self) -> list[str]:
        return list(_caveats(self.stored, self.selection))

    def stored_dtype(self, name: str) -> torch.dtype:
        return self.stored.index.dtype(self._dcp_names[name])

    def read(self, names: Iterable[str]) -> Iterator[Tensor]:
        return self.stored.stream([self._dcp_names[name] for name in names])

    def read_batch(self, names: Sequence[str], buffer: ReusableBuffer) -> Iterator[Tensor]:
        dcp_names = [self._dcp_names[name] for name in names]
        targets = buffer.tensors([(self.stored.index.shape(name), self.stored.index.dtype(name)) for name in dcp_names])
        values = self.stored.read_values(dcp_names, into=dict(zip(dcp_names, targets, strict=True)))
        return (values[name] for name in dcp_names)

    def extra_state(self, name: str) -> Any:
        return self.stored.extra_state(self.selection.extra_states[name])


class FileSource(WeightSource):
    """The weights in a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file, or in several files and their index."""

    def __init__(self, path: Path) -> None:
        self._files = WeightReader(path)
        entries = self._files.meta_tensors
        tensors = {name: tensor for name, tensor in entries.items() if tensor is not None}
        super().__init__(path, step_in_name(path), tensors, entries.keys() - tensors.keys())

    def read(self, names: Iterable[str]) -> Iterator[Tensor]:
        return (self._files[name].detach() for name in names)  # torch.save files may hold parameters

    def extra_state(self, name: str) -> Any:
        return self._files[name]


def open_source(
    path: Path,
    weights_kind: WeightsKind,
    *,
    step: int | None = None,
    track: str | None = None,
    entry: str | None = None,
    dtype: torch.dtype | None = None,
    on_ignored: Callable[[str], object] = lambda _: None,
) -> WeightSource:
    """Open the weights in a checkpoint or in files.

    Args:
        path: a root of checkpoints, one checkpoint, any folder that ``dcp.save`` wrote, a file of weights, its index,
            or their folder.
        step: applies to checkpoints only; so do ``weights_kind``, ``track``, ``entry`` and ``dtype``.
        on_ignored: called with a message if a choice has no effect.

    Raises: CheckpointError when there are no such weights, or when ``step`` is given for files.
    """
    if path.exists() and not has_checkpoint(path):
        if step is not None:
            raise CheckpointError(
                f"{path} is an export, which has no steps: leave out `step` (--step on the command line)"
            )
        if track is not None or entry is not None:
            on_ignored(f"--track and --entry have no effect on {path}, which is an export")
        return FileSource(path)
    stored = StoredCheckpoint(find_checkpoint(path, step))
    return CheckpointSource(stored, stored.weights(weights_kind, track=track, entry=entry, dtype=dtype))


def is_extra_state(name: str) -> bool:
    """Whether torch saves the result of a module's ``get_extra_state`` under this name."""
    return name.endswith(EXTRA_STATE_SUFFIX)


def _caveats(stored: StoredCheckpoint, selection: WeightSelection) -> Iterator[str]:
    """Warnings about these weights that a user should see."""
    if selection.is_model_missing:
        model_names = ", ".join(repr(dotted_name(key_path)) for key_path in stored.index.models)
        with_names = f" with the names of these averages (it holds {model_names})" if model_names else ""
        yield (f"{stored.folder} holds no live model{with_names}: only tensors that have an average are used")
    if selection.averages and (note := selection.averages.describe_initial_weights(selection.track)):
        yield note
    if trained := [name for name in selection.without_average if name in stored.index.optimized_names]:
        yield (
            f"{len(trained)} tensors that an optimizer in the checkpoint trains have no average, so their live values "
            f"are used: {abbreviated(trained)}"
        )
    unexplained = [name for name in selection.without_average if name not in trained]
    if unexplained and not stored.manifest:
        yield (
            f"{len(unexplained)} tensors have no average, so their live values are used (they may be frozen or tied: "
            f"the checkpoint does not record which): {abbreviated(unexplained)}"
        )
    if ties := selection.guessed_ties:
        pairs = [f"{name} (that of {first})" for name, first in ties.items()]
        yield (
            f"{len(pairs)} tensors get the average of another tensor with equal live values (most likely they are "
            f"tied; the checkpoint does not record it): {abbreviated(pairs)}"
        )
