"""Exchanges the contents of two lists of tensors so that an exception at any point loses no element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ema_dist.kernels.lists import chunks
from ema_dist.kernels.scratch import allocate_scratch, max_scratch_bytes, scratch_views

TensorLists = tuple[list[Tensor], list[Tensor]]


class Exchange:
    """Exchanges the contents of each pair of tensors, bit for bit, and exchanges them back.

    An exception may end `run` or `run_back` between any two bytecodes. Call either of them again to continue.

    Args:
        lists: the result of `group_pairs`.
        is_exchanged: whether the contents are exchanged already, so that only `run_back` has something to do.

    Memory: while it runs, one scratch for each device, of at most `CPU_SCRATCH_BYTES` or `DEVICE_SCRATCH_BYTES`; a
        smaller one if there is no memory for that.
    """

    def __init__(self, lists: Sequence[TensorLists], *, is_exchanged: bool = False) -> None:
        chunk_list = [chunk for left, right in lists for chunk in _split(left, right, max_scratch_bytes(left[0]))]
        self._state = _State(chunk_list, exchanged=len(chunk_list) if is_exchanged else 0)

    def run(self) -> None:
        """Exchange the chunks that are not exchanged yet. Raises: RuntimeError when no scratch can be allocated."""
        self._run(forward=True)

    def run_back(self) -> None:
        """Exchange back the chunks that are exchanged. Raises: RuntimeError when no scratch can be allocated."""
        self._run(forward=False)

    @torch.no_grad()
    def _run(self, *, forward: bool) -> None:
        self._complete_open_chunk()
        scratches = self._allocate_scratches()
        while (index := self._state.next_index(forward=forward)) is not None:
            chunk_list, exchanged, _ = self._state
            left, right = chunk_list[index]
            scratch = scratches[left[0].device]
            saved = scratch_views(scratch[: sum(piece.nbytes for piece in left)].view(left[0].dtype), left)
            torch._foreach_copy_(saved, left)
            open_chunk = _OpenChunk(left, right, saved, exchanged_after=index + 1 if forward else index)
            self._state = _State(chunk_list, exchanged, open_chunk)
            self._complete_open_chunk()

    def _complete_open_chunk(self) -> None:
        # Each copy can be repeated until the next assignment, because it does not write to what it reads.
        chunk_list, exchanged, open_chunk = self._state
        if open_chunk is None:
            return
        left, right, saved, exchanged_after, is_left_written = open_chunk
        if not is_left_written:
            torch._foreach_copy_(left, right)
            self._state = _State(
                chunk_list, exchanged, _OpenChunk(left, right, saved, exchanged_after, is_left_written=True)
            )
        torch._foreach_copy_(right, saved)
        self._state = _State(chunk_list, exchanged_after)

    def _allocate_scratches(self) -> dict[torch.device, Tensor]:
        """A scratch for each device, as large as the largest chunk there; chunks that are larger are split further."""
        needed: dict[torch.device, int] = {}
        for left, _ in self._state.chunk_list:
            size = sum(piece.nbytes for piece in left)
            needed[left[0].device] = max(size, needed.get(left[0].device, 0))
        scratches = {device: allocate_scratch(nbytes, device) for device, nbytes in needed.items()}
        if any(scratch.nbytes < needed[device] for device, scratch in scratches.items()):
            pieces = [[*_split(*lists, scratches[lists[0][0].device].nbytes)] for lists in self._state.chunk_list]
            exchanged = sum(len(some) for some in pieces[: self._state.exchanged])
            self._state = _State([chunk for some in pieces for chunk in some], exchanged)
        return scratches


class _OpenChunk(NamedTuple):
    """A chunk whose left pieces are saved, and whose exchange must be completed."""

    left: list[Tensor]
    right: list[Tensor]
    saved: list[Tensor]
    exchanged_after: int
    """The number of exchanged chunks once this one is complete."""
    is_left_written: bool = False


class _State(NamedTuple):
    """The progress of the exchange. It is replaced as a whole, so that it is consistent after any exception."""

    chunk_list: list[TensorLists]
    exchanged: int
    """The number of chunks, from the first one, whose contents are exchanged."""
    open_chunk: _OpenChunk | None = None

    def next_index(self, *, forward: bool) -> int | None:
        """The index of the chunk to exchange next; None if there is none left."""
        if forward:
            return self.exchanged if self.exchanged < len(self.chunk_list) else None
        return self.exchanged - 1 if self.exchanged else None


def _split(left: list[Tensor], right: list[Tensor], max_bytes: int) -> Sequence[TensorLists]:
    return [(ours, theirs) for ours, theirs in chunks(left, right, max_bytes=max_bytes)]
