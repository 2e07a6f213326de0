"""All tensors and tracks in one launch of a Triton kernel, which reads each live value once, in its own dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ema_dist.kernels.follow import UnfitError
from ema_dist.kernels.in_chunks import in_chunks_only
from ema_dist.kernels.lerp import Update, Weight
from ema_dist.kernels.random_bits import noise_tables
from ema_dist.kernels.rounding import ByChance, Remainders, Rounding
from ema_dist.kernels.tables import Row, flat_rows, tables

BLOCK = 4096
"""Elements that one program moves."""

ALIGNMENT = 16
"""Bytes that one thread moves at a time."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class InOneLaunch:
    """Moves all tensors by one launch, two where some lie at odd addresses; weights come from a tensor on the device.

    An update that gets its weights, and its number, as 0-d tensors of the device can be captured in a CUDA graph.
    Tensors that have gaps, or that are laid out otherwise than their averages, move as `in_chunks` moves them.
    It keeps the tensors' addresses: make another one when they move to other storage.

    Args:
        tracks: the averages of each track, in the order of ``values``, all of one dtype.
        values: the live weights, of one dtype, on the averages' device.
        finite: False where infinities may occur; see `lerp_`.
        rounding: of bfloat16 averages; None for to nearest.

    Memory: a table of 12 bytes for every 4096 elements, and one of 16 and more for every tensor.
    Raises: UnfitError when Triton is missing, or cannot move such tensors.
    """

    name = "triton"

    def __init__(
        self,
        tracks: Sequence[list[Tensor]],
        values: list[Tensor],
        *,
        finite: bool = True,
        rounding: Rounding | None = None,
    ) -> None:
        code = _code_for(tracks, values)
        remainders = rounding.tracks if isinstance(rounding, Remainders) else ()
        rows, flat, others = flat_rows(values, *tracks, *remainders)
        self._others = in_chunks_only(others, tracks, values, finite=finite, rounding=rounding)
        self._weights = _Slots([0.0] * len(tracks), torch.float64, values[0].device)
        self._counts = isinstance(rounding, ByChance)
        self._update = _Slots([0], torch.int32, values[0].device)
        self._rows = rows  # whose addresses are only good as long as they are
        self._written = [tensor for _, *written in rows for tensor in written]
        self._launches: list[Callable[[], object]] = []
        for aligned in (True, False):
            these = [index for index, row in enumerate(rows) if _is_aligned(row) == aligned]
            if these:
                some = rounding.of([flat[index] for index in these]) if rounding else None
                launch = self._launch(code, [rows[index] for index in these], some, finite=finite, aligned=aligned)
                self._launches.append(launch)
        try:
            self._run()  # compiles them; weights of zero leave everything as it is
        except Exception as error:  # no C compiler, a GPU that is too old: Triton and its backends raise what they like
            raise UnfitError(f"Triton cannot compile here: {error!r}") from error

    @torch.no_grad()
    def __call__(self, weights: Sequence[Weight], update: Update = 0) -> None:
        """Move each track by its weight."""
        self._weights.hold(weights)
        if self._counts:
            self._update.hold([update])
        self._run()
        increment_version(self._written)
        self._others(weights, update)

    def _run(self) -> None:
        device = self._weights.all.device
        # Triton launches on the current device, whatever it is given.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for launch in self._launches:
                launch()

    def _launch(
        self, code: ModuleType, rows: list[Row], rounding: Rounding | None, *, finite: bool, aligned: bool
    ) -> Callable[[], object]:
        """What launches the kernel for these tensors."""
        live, stored = rows[0][0].dtype, rows[0][1].dtype
        wide = torch.float64 if stored == torch.float64 else torch.float32
        types = [_type(code, dtype) for dtype in (live, torch.uint16 if rounding else stored, wide)]
        found = tables(rows, block=BLOCK)
        noise: Sequence[Tensor] = [found.sizes] * 3  # which is not read
        how = code.REMAINDERS if rounding else code.NEAREST
        if isinstance(rounding, ByChance):
            noise = noise_tables(rounding, tracks=len(self._weights.all), device=found.sizes.device)
            how = code.CHANCE
        kernel = code.follow[(len(found.block_tensors),)]
        variables = (*found, *noise, self._weights.all, self._update.all, len(rows))
        return partial(kernel, *variables, *types, len(self._weights.all), finite, how.value, aligned, BLOCK)


class _Slots:
    """Numbers on the device, written to only where they change."""

    def __init__(self, numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> None:
        self.all = torch.tensor(numbers, dtype=dtype, device=device)
        self._each = list(self.all.unbind())
        self._held: list[float | Tensor | None] = [*numbers]

    def hold(self, numbers: Sequence[float | Tensor]) -> None:
        for index, (slot, number) in enumerate(zip(self._each, numbers, strict=True)):
            if isinstance(number, Tensor):
                slot.copy_(number, non_blocking=True)
                self._held[index] = None
            elif self._held[index] != number:
                slot.fill_(number)
                self._held[index] = number


def _type(code: ModuleType, dtype: torch.dtype) -> object:
    """Triton's name for it."""
    return getattr(code.tl, str(dtype).removeprefix("torch."))


def _code_for(tracks: Sequence[list[Tensor]], values: list[Tensor]) -> ModuleType:
    """The module that Triton compiles."""
    dtypes = {track[0].dtype for track in tracks}
    if len(dtypes) > 1 or not {values[0].dtype, *dtypes} <= {*DTYPES}:
        raise UnfitError(f"it moves tracks of one dtype, among {DTYPES}; found {dtypes} that follow {values[0].dtype}")
    try:
        from ema_dist.kernels import triton_kernel  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise UnfitError("Triton is missing: pip install triton") from error
    if values[0].device.type == "cpu" and not triton_kernel.is_interpreted():
        raise UnfitError("Triton needs a GPU, or TRITON_INTERPRET=1 to be tried without one")
    return triton_kernel


def _is_aligned(row: Row) -> bool:
    return all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in row)
