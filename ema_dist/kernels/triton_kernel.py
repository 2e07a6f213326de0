"""Updates all tensors and tracks in one launch of a Triton kernel, which reads each live value once, unconverted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ema_dist.kernels.address_tables import Row, find_dense_rows, make_address_tables
from ema_dist.kernels.kernel import UnsupportedKernelError, UpdateIndex, Weight
from ema_dist.kernels.random_bits import make_noise_tables
from ema_dist.kernels.rounding import CompensatedRounding, Rounding, StochasticRounding
from ema_dist.kernels.scratch_kernel_factory import make_subset_kernel
from ema_dist.kernels.write_log import WriteLog

BLOCK = 4096
"""Elements that one program processes: the tables have a row for each block."""

PIECE = 1024
"""Elements that a program processes at a time: 8 for each of its 128 threads."""

ALIGNMENT = 16
"""Bytes that one thread loads or stores at a time."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TritonKernel:
    """Lerps all tensors in one launch, or two if the addresses of some are not aligned; weights are on the device.

    An update whose weights and index are 0-d tensors on the device can be captured in a CUDA graph. A kernel of
    `make_scratch_kernel` processes tensors that have gaps, or whose strides differ from their averages'.
    It keeps the tensors' addresses: make another kernel when they get other storage.

    Args:
        tracks: the averages of each track, in the order of ``values``, all of one dtype.
        values: the live weights, of one dtype, on the averages' device.
        finite: False where infinities may occur; see `lerp_`.
        rounding: how averages are rounded to bfloat16; None rounds to nearest.

    Memory: tables of 12 bytes for every 4096 elements, and of 16 bytes or more for every tensor.
    Raises: UnsupportedKernelError when Triton is missing, or does not support these tensors.
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
        jit_module = _import_jit_module(tracks, values)
        residuals = rounding.residuals if isinstance(rounding, CompensatedRounding) else ()
        rows, dense_indices, strided_indices = find_dense_rows(values, *tracks, *residuals)
        self._strided_kernel = make_subset_kernel(strided_indices, tracks, values, finite=finite, rounding=rounding)
        self._weights = _DeviceScalars([0.0] * len(tracks), torch.float64, values[0].device)
        self._is_stochastic = isinstance(rounding, StochasticRounding)
        self._update_index = _DeviceScalars([0], torch.int32, values[0].device)
        self._rows = rows  # keeps the storage alive: the launches hold only addresses
        self._outputs = [tensor for _, *outputs in rows for tensor in outputs]
        self._launches: list[Callable[[], object]] = []
        for aligned in (True, False):
            indices = [index for index, row in enumerate(rows) if _is_aligned(row) == aligned]
            if indices:
                subset_rounding = rounding.subset([dense_indices[index] for index in indices]) if rounding else None
                launch = self._make_launch(
                    jit_module, [rows[index] for index in indices], subset_rounding, finite=finite, aligned=aligned
                )
                self._launches.append(launch)
        try:
            self._run()  # compiles the kernel; the weights are still zero, so that no average changes
        except Exception as error:  # Triton and its backends raise various types: no C compiler, a GPU too old
            raise UnsupportedKernelError(f"Triton cannot compile here: {error!r}") from error

    @torch.no_grad()
    def __call__(
        self, weights: Sequence[Weight], update_index: UpdateIndex = 0, write_log: WriteLog | None = None
    ) -> None:
        """Lerp each track by its weight."""
        self._weights.write(weights)
        if self._is_stochastic:
            self._update_index.write([update_index])
        write_log = write_log or WriteLog()
        write_log.write_interruptible(self._run)
        increment_version(self._outputs)  # autograd does not see writes by address
        self._strided_kernel(weights, update_index, write_log)

    def _run(self) -> None:
        device = self._weights.tensor.device
        # Triton launches on the current device, whichever device its arguments are on.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for launch in self._launches:
                launch()

    def _make_launch(
        self, jit_module: ModuleType, rows: list[Row], rounding: Rounding | None, *, finite: bool, aligned: bool
    ) -> Callable[[], object]:
        """A callable that launches the kernel for these tensors."""
        live, stored = rows[0][0].dtype, rows[0][1].dtype
        wide = torch.float64 if stored == torch.float64 else torch.float32
        types = [_triton_dtype(jit_module, dtype) for dtype in (live, torch.uint16 if rounding else stored, wide)]
        address_tables = make_address_tables(rows, block=BLOCK)
        noise: Sequence[Tensor] = [address_tables.sizes] * 3  # placeholders, which the kernel does not read
        rounding_mode = jit_module.COMPENSATED if rounding else jit_module.NEAREST
        if isinstance(rounding, StochasticRounding):
            noise = make_noise_tables(rounding, tracks=len(self._weights.tensor), device=address_tables.sizes.device)
            rounding_mode = jit_module.STOCHASTIC
        kernel = jit_module.lerp_tracks[(len(address_tables.block_tensors),)]
        runtime_args = (*address_tables, *noise, self._weights.tensor, self._update_index.tensor, len(rows))
        return partial(
            kernel, *runtime_args, *types, len(self._weights.tensor), finite, rounding_mode.value, aligned, BLOCK, PIECE
        )


class _DeviceScalars:
    """Numbers on the device, written only when they change."""

    def __init__(self, numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.tensor(numbers, dtype=dtype, device=device)
        self._elements = list(self.tensor.unbind())
        self._last_written: list[float | Tensor | None] = [*numbers]

    def write(self, numbers: Sequence[float | Tensor]) -> None:
        for index, (slot, number) in enumerate(zip(self._elements, numbers, strict=True)):
            if isinstance(number, Tensor):
                slot.copy_(number, non_blocking=True)
                self._last_written[index] = None
            elif self._last_written[index] != number:
                slot.fill_(number)
                self._last_written[index] = number


def _triton_dtype(jit_module: ModuleType, dtype: torch.dtype) -> object:
    """Triton's dtype for torch's."""
    return getattr(jit_module.tl, str(dtype).removeprefix("torch."))


def _import_jit_module(tracks: Sequence[list[Tensor]], values: list[Tensor]) -> ModuleType:
    """The module with the functions that Triton compiles.

    Raises: UnsupportedKernelError as `TritonKernel` does.
    """
    dtypes = {track[0].dtype for track in tracks}
    if len(dtypes) > 1 or not {values[0].dtype, *dtypes} <= {*DTYPES}:
        raise UnsupportedKernelError(
            f"it needs averages of one dtype, and dtypes among {DTYPES}; found averages of {dtypes} and live weights "
            f"of {values[0].dtype}"
        )
    try:
        from ema_dist.kernels import triton_jit  # noqa: PLC0415 - optional, and slow to import
    except ModuleNotFoundError as error:
        raise UnsupportedKernelError("Triton is missing: pip install triton") from error
    except Exception as error:  # an installation for another Python, driver or version of torch raises various types
        raise UnsupportedKernelError(f"Triton cannot be imported: {error!r}") from error
    if values[0].device.type == "cpu" and not triton_jit.is_interpreted():
        raise UnsupportedKernelError("Triton needs a GPU, or TRITON_INTERPRET=1 to be tried without one")
    return triton_jit


def _is_aligned(row: Row) -> bool:
    return all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in row)
