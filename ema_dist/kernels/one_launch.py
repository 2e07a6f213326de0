"""All tensors and tracks in one launch of a Triton kernel, which reads each live value once, in its own dtype."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ema_dist.kernels.follow import UnfitError
from ema_dist.kernels.move import Weight
from ema_dist.kernels.tables import Row, flat_rows, tables

BLOCK = 4096
"""Elements that one program moves."""

ALIGNMENT = 16
"""Bytes that one thread moves at a time."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class InOneLaunch:
    """Moves all tensors by one launch, two where some lie at odd addresses; weights come from a tensor on the device.

    An update that gets its weights as 0-d tensors of the device can be captured in a CUDA graph. Tensors that have
    gaps, or that are laid out otherwise than their averages, move as `InChunks` moves them.
    It keeps the tensors' addresses: make another one when they move to other storage.

    Args:
        tracks: the averages of each track, in the order of ``values``, all of one dtype.
        values: the live weights, of one dtype, on the averages' device.
        finite: False where infinities may occur; see `lerp_`.

    Memory: a table of 12 bytes for every 4096 elements, and one of 16 and more for every tensor.
    Raises: UnfitError when Triton is missing, or cannot move such tensors.
    """

    name = "triton"

    def __init__(self, tracks: Sequence[list[Tensor]], values: list[Tensor], *, finite: bool = True) -> None:
        code = _code_for(tracks, values)
        flat, self._others = flat_rows(tracks, values, finite=finite)
        aligned = [row for row in flat if _is_aligned(row)]
        unaligned = [row for row in flat if not _is_aligned(row)]
        self._weights = torch.zeros(len(tracks), dtype=torch.float64, device=values[0].device)
        self._sent: list[Weight | None] = [0.0] * len(tracks)
        self._slots = list(self._weights.unbind())
        self._launches = [
            _Launch(code, rows, self._weights, finite=finite, aligned=rows is aligned)
            for rows in (aligned, unaligned)
            if rows
        ]
        self._launch()  # compiles it; weights of zero leave everything as it is

    @torch.no_grad()
    def __call__(self, weights: Sequence[Weight], update: int = 0) -> None:  # noqa: ARG002
        """Move each track by its weight."""
        for index, (slot, weight) in enumerate(zip(self._slots, weights, strict=True)):
            if isinstance(weight, Tensor):
                slot.copy_(weight, non_blocking=True)
                self._sent[index] = None
            elif self._sent[index] != weight:
                slot.fill_(weight)
                self._sent[index] = weight
        self._launch()
        for other in self._others:
            other(weights)

    def _launch(self) -> None:
        for launch in self._launches:
            launch()


class _Launch:
    """One launch for the flat tensors of ``rows``: the live values, and each track's averages."""

    def __init__(
        self,
        code: ModuleType,
        rows: Sequence[Row],
        weights: Tensor,
        *,
        finite: bool,
        aligned: bool,
    ) -> None:
        self._rows = rows  # whose addresses are only good as long as they are
        live, stored = rows[0][0].dtype, rows[0][1].dtype
        wide = torch.float64 if stored == torch.float64 else torch.float32
        types = [getattr(code.tl, str(dtype).removeprefix("torch.")) for dtype in (live, stored, wide)]
        found = tables(rows, block=BLOCK)
        self._arguments = (*found, weights, len(rows), *types, len(rows[0]) - 1, finite, aligned, BLOCK)
        self._kernel = code.follow[(len(found.block_tensors),)]

    def __call__(self) -> None:
        self._kernel(*self._arguments)


def _code_for(tracks: Sequence[list[Tensor]], values: list[Tensor]) -> ModuleType:
    """The module that Triton compiles."""
    dtypes = {track[0].dtype for track in tracks}
    if len(dtypes) > 1 or not {values[0].dtype, *dtypes} <= {*DTYPES}:
        raise UnfitError(f"it moves tracks of one dtype, among {DTYPES}; found {dtypes} that follow {values[0].dtype}")
    try:
        from ema_dist.kernels import triton_code  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise UnfitError("Triton is missing: pip install triton") from error
    if values[0].device.type == "cpu" and not triton_code.is_interpreted():
        raise UnfitError("Triton needs a GPU, or TRITON_INTERPRET=1 to be tried without one")
    return triton_code


def _is_aligned(row: Row) -> bool:
    return all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in row)
