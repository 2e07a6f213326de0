"""Selects the kernel for a group of tensors: the requested one, or the fastest one on this machine."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ema_dist.kernels.c_kernel import CompiledKernel
from ema_dist.kernels.foreach_kernel import ForeachKernel
from ema_dist.kernels.kernel import Kernel, UnsupportedKernelError
from ema_dist.kernels.lists import SMALL_NUMEL, is_small
from ema_dist.kernels.rounding import Rounding
from ema_dist.kernels.scratch import chunk_elements
from ema_dist.kernels.scratch_kernel_factory import make_scratch_kernel
from ema_dist.kernels.triton_kernel import TritonKernel

KERNELS = {"foreach": ForeachKernel, "scratch": make_scratch_kernel, "compiled": CompiledKernel, "triton": TritonKernel}
"""Kernels by the names that users pass and summaries show."""

MAX_MEASURED_NUMEL = 2**24
"""Limit on the elements of the tensors on which kernels are timed: more than a cache holds, but quick to process."""

Agree = Callable[[str, str], str]
"""Takes a question and this rank's answer, and returns the answer that all ranks use."""

TIMING_ROUNDS = 5
"""Rounds in which all kernels are timed in turn, so that other load on the machine affects all of them."""


def make_kernel(
    tracks: Sequence[list[Tensor]],
    values: list[Tensor],
    *,
    finite: bool = True,
    kernel: str | None = None,
    rounding: Rounding | None = None,
    agree: Agree | None = None,
) -> Kernel:
    """A kernel that lerps these tracks towards these values at each call, as `lerp_tracks_` does once.

    It keeps views of the tensors: make another kernel when they get other storage.

    Args:
        tracks: the averages of each track, in the order of ``values``; all tensors of one track have one dtype.
        values: the live weights, of one dtype, on the averages' device.
        finite: False where infinities may occur; see `lerp_`.
        kernel: a name in `KERNELS`. None selects the fastest kernel, timed once in a process for each combination of
            device, dtypes, number of tracks, and number and size of tensors; there is no choice within one chunk.
            If the kernel does not support the tensors, another one replaces it with a warning; see its ``name``.
        rounding: how averages are rounded to bfloat16; None rounds to nearest.
        agree: makes all ranks use one answer, where they hold the same averages and must update them alike.

    Memory: while kernels are timed, as much as the tensors, at most 64 MiB for each float32 track and for the values.
    Raises: ValueError for an unknown ``kernel``, and for a ``rounding`` of averages that are not bfloat16.
    """
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"expected a kernel among {', '.join(KERNELS)}, or None for the fastest; found {kernel!r}")
    if rounding and (other_dtypes := {average.dtype for track in tracks for average in track} - {torch.bfloat16}):
        raise ValueError(f"{type(rounding).__name__} is for bfloat16 averages; found {other_dtypes}, which go without")
    if not tracks or not values:
        return ForeachKernel([], [])
    torch_kernels = _torch_kernels(tracks, values, rounding)
    choice = f"kernel={kernel!r}"
    if kernel is None:
        candidates = (*torch_kernels, "triton") if values[0].is_cuda else torch_kernels
        workload = _Workload.from_tensors(tracks, values, finite=finite)
        kernel = candidates[0] if len(candidates) == 1 else _fastest(workload, candidates)
        if agree and len(candidates) > 1:
            kernel = agree(f"the fastest of {candidates} for {workload}", kernel)
        choice = f"{kernel!r}, found to be the fastest,"
    try:
        return KERNELS[kernel](tracks, values, finite=finite, rounding=rounding)
    except UnsupportedKernelError as reason:
        fallback = torch_kernels[0]
        warnings.warn(f"{choice} cannot move these averages, {fallback!r} does: {reason}", stacklevel=2)
        return KERNELS[fallback](tracks, values, finite=finite, rounding=rounding)


@dataclass(frozen=True)
class _Workload:
    """The properties of a group of tensors that decide which kernel is the fastest, whatever the rounding.

    Args:
        elements: their number rounded down to a power of 2, because tensors that fit into a cache are read faster.
    """

    device: str
    live: torch.dtype
    averages: tuple[torch.dtype, ...]
    is_small: bool
    elements: int
    finite: bool

    @classmethod
    def from_tensors(cls, tracks: Sequence[list[Tensor]], values: list[Tensor], *, finite: bool) -> _Workload:
        averages = tuple(track[0].dtype for track in tracks)
        elements = max(1, sum(value.numel() for value in values))
        elements = min(MAX_MEASURED_NUMEL, 1 << (elements.bit_length() - 1))
        return cls(values[0].device.type, values[0].dtype, averages, is_small(values), elements, finite)

    def make_tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """Tensors of ``dtype`` on which kernels are timed for this workload."""
        numel = min(SMALL_NUMEL // 4 if self.is_small else self.elements // 4, self.elements)
        return [torch.zeros(numel, dtype=dtype, device=self.device) for _ in range(self.elements // numel)]


def _torch_kernels(tracks: Sequence[list[Tensor]], values: list[Tensor], rounding: Rounding | None) -> tuple[str, ...]:
    """Kernels that need nothing but torch and may differ in speed; the first one supports the tensors."""
    if rounding or any(track[0].dtype != values[0].dtype for track in tracks):
        return ("scratch",)
    elements = sum(value.numel() for value in values)
    is_one_chunk = chunk_elements(values, itemsize=values[0].element_size()) >= elements
    return ("foreach",) if len(tracks) == 1 or is_one_chunk else ("foreach", "scratch")


@cache
def _fastest(workload: _Workload, names: tuple[str, ...]) -> str:
    try:
        return _measure_fastest(workload, names)
    except torch.OutOfMemoryError:
        return names[0]


def _measure_fastest(workload: _Workload, names: tuple[str, ...]) -> str:
    values = workload.make_tensors(workload.live)
    tracks = [workload.make_tensors(dtype) for dtype in workload.averages]
    kernels: dict[str, Kernel] = {}
    for name in names:
        with suppress(UnsupportedKernelError):
            kernels[name] = KERNELS[name](tracks, values, finite=workload.finite)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for kernel in kernels.values():
        _seconds(kernel, len(tracks), workload.device)  # warm-up
    for _ in range(TIMING_ROUNDS):
        for name, kernel in kernels.items():
            seconds[name].append(_seconds(kernel, len(tracks), workload.device))
    return min(kernels, key=lambda name: sorted(seconds[name])[TIMING_ROUNDS // 2])


def _seconds(kernel: Kernel, tracks: int, device: str) -> float:
    _synchronize(device)
    begin = time.perf_counter()
    kernel([0.5] * tracks)
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize(device)
