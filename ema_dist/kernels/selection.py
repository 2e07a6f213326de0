"""Selects the kernel for a group of tensors: the requested one, or the fastest one on this machine."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ema_dist.kernels.c_kernel import CompiledKernel, compiler_problem
from ema_dist.kernels.foreach_kernel import ForeachKernel
from ema_dist.kernels.kernel import Kernel, UnsupportedKernelError
from ema_dist.kernels.lists import SMALL_NUMEL, is_small
from ema_dist.kernels.rounding import CompensatedRounding, Rounding, StochasticRounding, TensorOffset
from ema_dist.kernels.scratch import chunk_elements
from ema_dist.kernels.scratch_kernel_factory import make_scratch_kernel
from ema_dist.kernels.triton_kernel import TritonKernel

_log = logging.getLogger(__name__)

KERNELS: dict[str, Callable[..., Kernel]] = {
    "foreach": ForeachKernel,
    "scratch": make_scratch_kernel,
    "compiled": CompiledKernel,
    "triton": TritonKernel,
}
"""Kernels by the names that users pass and summaries show."""

AUTO = "auto"
"""The name that users pass for the fastest kernel, including the one that the C compiler must build."""

MAX_MEASURED_NUMEL = 2**24
"""Limit on the elements of the tensors on which kernels are timed: more than a cache holds, but quick to process."""

MAX_MEASURED_NUMEL_ON_DEVICE = 2**26
"""The same for large tensors on a device: a GPU processes `MAX_MEASURED_NUMEL` in the time of a few launches."""

MIN_MEASURED_NUMEL_ON_DEVICE = 2**20
"""The fewest elements of large tensors on which kernels are timed if memory is short."""

Agree = Callable[[str, str], str]
"""Takes a question and this rank's answer, and returns the answer that all ranks use."""

TIMING_ROUNDS = 5
"""Rounds in which all kernels are timed in turn, so that other load on the machine affects all of them."""

TIMED_CALLS = 4
"""Calls that are queued and timed together on a device."""


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
            device, dtypes, rounding, number of tracks, and number and size of tensors. If the values fit into one
            chunk, ``"foreach"`` and ``"scratch"`` are not compared. `AUTO` may also select ``"compiled"`` for tensors
            on the CPU, if a C compiler works. If the kernel does not support the tensors, another one replaces it with
            a warning; see its ``name``.
        rounding: how averages are rounded to bfloat16; None rounds to nearest.
        agree: makes the ranks of a model use one answer, because those that hold the same averages must update them
            identically. The question does not contain the sizes of the tensors, which differ if shards are uneven.

    Memory: while kernels are timed, as much as the tensors, at most 64 MiB on the CPU and 256 MiB on a device for each
        float32 track and for the values.
    Raises: ValueError for an unknown ``kernel``, and for a ``rounding`` of averages that are not bfloat16.
    """
    if kernel not in (*KERNELS, AUTO, None):
        raise ValueError(
            f"expected a kernel among {', '.join(KERNELS)}, or {AUTO!r} or None for the fastest; found {kernel!r}"
        )
    if rounding and (other_dtypes := {average.dtype for track in tracks for average in track} - {torch.bfloat16}):
        raise ValueError(f"{type(rounding).__name__} requires bfloat16 averages, found {other_dtypes}: omit rounding=")
    if not tracks or not values:
        return ForeachKernel([], [])
    torch_kernels = _torch_kernels(tracks, values, rounding)
    choice = f"kernel={kernel!r}"
    if kernel in (AUTO, None):
        is_auto, candidates = kernel == AUTO, torch_kernels
        if values[0].is_cuda:
            candidates = (*torch_kernels, "triton")
        elif is_auto and values[0].device.type == "cpu":
            candidates = _with_compiled(torch_kernels)
        workload = _Workload.from_tensors(tracks, values, finite=finite, rounding=rounding)
        kernel = candidates[0] if len(candidates) == 1 else _agreed_fastest(workload, candidates, choice, agree)
        if is_auto:
            _log.info("kernel='auto' selects %r among %s for %s", kernel, candidates, workload)
        choice = f"{kernel!r}, found to be the fastest,"
    try:
        return KERNELS[kernel](tracks, values, finite=finite, rounding=rounding)
    except UnsupportedKernelError as reason:
        fallback = torch_kernels[0]
        warnings.warn(f"{choice} does not support these averages, so {fallback!r} updates them: {reason}", stacklevel=2)
        return KERNELS[fallback](tracks, values, finite=finite, rounding=rounding)


@dataclass(frozen=True)
class _Workload:
    """The properties of a group of tensors that decide which kernel is the fastest.

    Args:
        elements: their number, rounded down to a power of 2; tensors that fit into a cache are read faster.
    """

    device: torch.device
    live: torch.dtype
    averages: tuple[torch.dtype, ...]
    is_small: bool
    elements: int
    finite: bool
    rounding: type[Rounding] | None = None

    @classmethod
    def from_tensors(
        cls, tracks: Sequence[list[Tensor]], values: list[Tensor], *, finite: bool, rounding: Rounding | None
    ) -> _Workload:
        device = values[0].device
        is_large_on_device = device.type != "cpu" and not is_small(values)
        limit = MAX_MEASURED_NUMEL_ON_DEVICE if is_large_on_device else MAX_MEASURED_NUMEL
        averages = tuple(track[0].dtype for track in tracks)
        elements = max(1, sum(value.numel() for value in values))
        elements = min(limit, 1 << (elements.bit_length() - 1))
        rounding_type = type(rounding) if rounding else None
        return cls(device, values[0].dtype, averages, is_small(values), elements, finite, rounding_type)

    def shared_by_ranks(self) -> _Workload:
        """The workload without the index of the device and the sizes, which differ between ranks of one model."""
        return replace(self, device=torch.device(self.device.type), is_small=False, elements=0)

    def make_tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """Tensors of ``dtype`` on which kernels are timed for this workload."""
        numel = min(SMALL_NUMEL // 4 if self.is_small else self.elements // 4, self.elements)
        return [torch.zeros(numel, dtype=dtype, device=self.device) for _ in range(self.elements // numel)]

    def make_rounding(self, tensors: int) -> Rounding | None:
        """A rounding for that many tensors, because kernels that round take several times longer than others."""
        if self.rounding is StochasticRounding:
            return StochasticRounding([TensorOffset(index) for index in range(tensors)])
        if self.rounding is CompensatedRounding:
            return CompensatedRounding([self.make_tensors(torch.int16) for _ in self.averages])
        return None


def _torch_kernels(tracks: Sequence[list[Tensor]], values: list[Tensor], rounding: Rounding | None) -> tuple[str, ...]:
    """Kernels that need nothing but torch and may differ in speed; the first one supports the tensors."""
    if rounding or any(track[0].dtype != values[0].dtype for track in tracks):
        return ("scratch",)
    elements = sum(value.numel() for value in values)
    is_one_chunk = chunk_elements(values, itemsize=values[0].element_size()) >= elements
    return ("foreach",) if len(tracks) == 1 or is_one_chunk else ("foreach", "scratch")


def _with_compiled(torch_kernels: tuple[str, ...]) -> tuple[str, ...]:
    if problem := compiler_problem():
        _log.info("kernel='auto' does not consider 'compiled': %s", problem)
        return torch_kernels
    return (*torch_kernels, "compiled")


def _agreed_fastest(workload: _Workload, candidates: tuple[str, ...], choice: str, agree: Agree | None) -> str:
    fastest = _fastest(workload, candidates)
    # Without the candidates: if one rank has less than a chunk, it has other ones.
    return agree(f"{choice}: the fastest for {workload.shared_by_ranks()}", fastest) if agree else fastest


@cache
def _fastest(workload: _Workload, names: tuple[str, ...]) -> str:
    try:
        return _measure_fastest(workload, names)
    except torch.OutOfMemoryError:
        if workload.elements <= MIN_MEASURED_NUMEL_ON_DEVICE:
            return names[0]
    return _fastest(replace(workload, elements=workload.elements // 4), names)


def _measure_fastest(workload: _Workload, names: tuple[str, ...]) -> str:
    values = workload.make_tensors(workload.live)
    tracks = [workload.make_tensors(dtype) for dtype in workload.averages]
    rounding = workload.make_rounding(len(values))
    kernels: dict[str, Kernel] = {}
    for name in names:
        with suppress(UnsupportedKernelError):
            kernels[name] = KERNELS[name](tracks, values, finite=workload.finite, rounding=rounding)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for kernel in kernels.values():
        _seconds(kernel, len(tracks), workload.device)  # warm-up
    for _ in range(TIMING_ROUNDS):
        for name, kernel in kernels.items():
            seconds[name].append(_seconds(kernel, len(tracks), workload.device))
    # The shortest times: other load on the machine only adds to them.
    shortest = {name: min(seconds[name]) for name in kernels}
    _log.info("kernels for %s: %s", workload, ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in shortest.items()))
    return min(shortest, key=lambda name: shortest[name])


def _seconds(kernel: Kernel, tracks: int, device: torch.device) -> float:
    """The time of one call; on a device, the mean of several calls that are queued, so that launches take no time."""
    weights = [0.5] * tracks
    module = None if device.type == "cpu" else torch.get_device_module(device)
    if module is None or not hasattr(module, "Event") or not hasattr(module, "device"):
        _synchronize(device)
        start = time.perf_counter()
        kernel(weights)
        _synchronize(device)
        return time.perf_counter() - start
    with module.device(device):
        begin, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
        kernel(weights)  # the device works on this call while the host launches the timed ones
        begin.record()
        for _ in range(TIMED_CALLS):
            kernel(weights)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / TIMED_CALLS


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
