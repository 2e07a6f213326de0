"""Updates all tensors and tracks in one call of a kernel that the machine's C compiler builds once for all runs."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ema_dist.kernels.address_tables import AddressTables, find_dense_rows, make_address_tables
from ema_dist.kernels.kernel import UnsupportedKernelError, UpdateIndex, Weight
from ema_dist.kernels.library_cache import load_library
from ema_dist.kernels.random_bits import make_noise_tables
from ema_dist.kernels.rounding import CompensatedRounding, Rounding, StochasticRounding
from ema_dist.kernels.scratch_kernel_factory import make_subset_kernel
from ema_dist.kernels.write_log import WriteLog
from ema_dist.signals import deferred_signals

BLOCK = 2**15
"""Elements that all tracks process before the next block: few enough for the L2 cache, enough for prefetching."""

MIN_THREAD_ELEMENTS = 2**18
"""Processing fewer elements takes less time than handing them to another thread."""

SOURCE = Path(__file__).with_name("c_kernel.c")
# Without -ffp-contract=off the compiler may fuse more operations than torch does, and the last bits may differ.
COMPILER_FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
C_TYPES: dict[torch.dtype, str] = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "half",
    torch.bfloat16: "bfloat",
}
ROUNDING_MACROS: dict[type, tuple[str, ...]] = {
    type(None): (),
    StochasticRounding: ("STOCHASTIC",),
    CompensatedRounding: ("COMPENSATED",),
}


class CompiledKernel:
    """Lerps all tensors in as many threads as torch has now, and reads each live value from memory once for all tracks.

    If the weights are numbers, float32 and float64 averages are bit-identical to torch's. A kernel of
    `make_scratch_kernel` processes tensors that have gaps, or whose strides differ from their averages'.
    It keeps views of the tensors: make another kernel when they get other storage.

    Args:
        tracks: the averages of each track, in the order of ``values``, all of one dtype.
        values: the live weights, of one dtype, on the CPU.
        finite: False where infinities may occur; see `lerp_`.
        rounding: how averages are rounded to bfloat16; None rounds to nearest.

    Memory: tables of 12 bytes for every 32768 elements, and of 16 bytes or more for every tensor.
    Raises: UnsupportedKernelError when no C compiler can build the kernel, or it does not support these tensors.
    """

    name = "compiled"

    def __init__(
        self,
        tracks: Sequence[list[Tensor]],
        values: list[Tensor],
        *,
        finite: bool = True,
        rounding: Rounding | None = None,
    ) -> None:
        dtypes = {track[0].dtype for track in tracks}
        if values[0].device.type != "cpu" or len(dtypes) > 1 or not {values[0].dtype, *dtypes} <= C_TYPES.keys():
            raise UnsupportedKernelError(
                f"it needs averages of one dtype on the CPU, and dtypes among {[*C_TYPES]}; found averages of {dtypes} "
                f"and live weights of {values[0].dtype} on {values[0].device}"
            )
        types = C_TYPES[values[0].dtype], C_TYPES[dtypes.pop()]
        kernel = _compile(_compiler(), *types, *ROUNDING_MACROS[type(rounding)])
        if isinstance(kernel, UnsupportedKernelError):
            raise kernel
        self._kernel = kernel
        residuals = rounding.residuals if isinstance(rounding, CompensatedRounding) else ()
        self._rows, dense_indices, strided_indices = find_dense_rows(values, *tracks, *residuals)
        self._strided_kernel = make_subset_kernel(strided_indices, tracks, values, finite=finite, rounding=rounding)
        self._outputs = [tensor for _, *outputs in self._rows for tensor in outputs]
        self._set_tables()
        self._block_ranges = _block_ranges(self._tables, torch.get_num_threads()) if self._tables else []
        self._noise = (None, None, None)
        if isinstance(rounding, StochasticRounding):
            self._noise = make_noise_tables(rounding.subset(dense_indices), tracks=len(tracks), device=values[0].device)
        self._weights = torch.zeros(len(tracks), dtype=torch.float64, device="cpu")
        self._settings = (len(self._rows), len(tracks), finite, BLOCK)

    @torch.no_grad()
    def __call__(
        self, weights: Sequence[Weight], update_index: UpdateIndex = 0, write_log: WriteLog | None = None
    ) -> None:
        """Lerp each track by its weight."""
        write_log = write_log or WriteLog()
        for index, weight in enumerate(weights):
            self._weights[index] = weight
        if self._tables:
            # share_memory_() of an average gives it other storage; the kernel would write to freed memory.
            if list(map(Tensor.data_ptr, self._outputs)) != self._addresses:
                self._set_tables()
            # Autograd does not see writes by address. This runs before the kernel, because the kernel evicts the
            # tensors' metadata from the caches of the processor.
            increment_version(self._outputs)
            all_tables = (*self._tables, *self._noise, self._weights)
            addresses = [None if table is None else table.data_ptr() for table in all_tables]
            kernel = partial(self._kernel, *addresses, int(update_index), *self._settings)
            if len(self._block_ranges) == 1:
                write_log.write(kernel, *self._block_ranges[0])
            else:
                with deferred_signals():  # an interrupted thread pool may stay locked
                    write_log.write_interruptible(partial(_run_in_threads, kernel, self._block_ranges))
        self._strided_kernel(weights, update_index, write_log)

    def _set_tables(self) -> None:
        """Store the addresses of the tensors."""
        self._addresses = list(map(Tensor.data_ptr, self._outputs))
        self._tables = make_address_tables(self._rows, block=BLOCK) if self._rows else None


def compiler_problem() -> str:
    """Why the kernel cannot be built on this machine; empty if it can."""
    kernel = _compile(_compiler(), "float", "float")
    return str(kernel) if isinstance(kernel, UnsupportedKernelError) else ""


def _compiler() -> str:
    """The command of the C compiler; empty if there is none."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or ""


@cache
def _compile(compiler: str, live: str, stored: str, *macros: str) -> Callable[..., None] | UnsupportedKernelError:
    """The kernel for these types, or the error, which is cached so that a failing compiler runs once."""
    if not compiler.strip():
        return UnsupportedKernelError("there is no C compiler: install gcc or clang, or name one in CC")
    wide = "double" if stored == "double" else "float"
    types = [f"LIVE={live}", f"STORED={stored}", f"WIDE={wide}", *["HALF"] * ("half" in (live, stored))]
    try:
        library = load_library(
            SOURCE, compiler=compiler, flags=[*COMPILER_FLAGS, *(f"-D{name}" for name in (*types, *macros))]
        )
    except UnsupportedKernelError as error:
        return error
    kernel = library.lerp_tracks
    kernel.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 7
    kernel.restype = None
    return kernel


def _block_ranges(tables: AddressTables, threads: int) -> list[tuple[int, int]]:
    """Ranges of blocks with about equally many elements: one for each thread, if each gets `MIN_THREAD_ELEMENTS`."""
    remaining = tables.sizes[tables.block_tensors] - tables.block_starts
    elements = remaining.clamp(max=BLOCK).cumsum(0)
    count = max(1, min(threads, int(elements[-1]) // MIN_THREAD_ELEMENTS))
    ends = [int(elements[-1]) * number // count for number in range(1, count + 1)]
    return [*pairwise([0, *(torch.searchsorted(elements, torch.tensor(ends, device="cpu")) + 1).tolist()])]


def _run_in_threads(kernel: Callable[[int, int], None], block_ranges: list[tuple[int, int]]) -> None:
    """Process all ranges concurrently, the first one in this thread."""
    first, *others = block_ranges
    futures = [_submit(partial(kernel, *block_range), threads=len(others)) for block_range in others]
    kernel(*first)
    for future in futures:
        future.result()


def _submit(task: Callable[[], None], *, threads: int) -> Future[None]:
    try:
        return _pool(threads, os.getpid()).submit(task)
    except RuntimeError:  # the interpreter is shutting down and starts no threads, but waits for this one
        task()
    done: Future[None] = Future()
    done.set_result(None)
    return done


@cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads of this process; a forked process has none of its parent's threads, hence the process id in the key."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ema_dist")
