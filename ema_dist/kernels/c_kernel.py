"""All tensors and tracks in one call of a kernel that the C compiler of this machine makes, within a second."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ema_dist.kernels.address_tables import AddressTables, find_dense_rows, make_address_tables
from ema_dist.kernels.kernel import UnsupportedKernelError, UpdateIndex, Weight
from ema_dist.kernels.random_bits import make_noise_tables
from ema_dist.kernels.rounding import CompensatedRounding, Rounding, StochasticRounding
from ema_dist.kernels.torch_kernels import make_subset_kernel

BLOCK = 2**15
"""Elements that all tracks move by before the next ones: they stay in the second cache, and are enough for memory to be
read ahead."""

MIN_THREAD_ELEMENTS = 2**18
"""Of a thread: fewer take less time than handing them over."""

SOURCE = Path(__file__).with_name("c_kernel.c")
COMPILER_FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
C_TYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "half", torch.bfloat16: "bfloat"}
ROUNDING_MACROS = {type(None): (), StochasticRounding: ("STOCHASTIC",), CompensatedRounding: ("COMPENSATED",)}


class CompiledKernel:
    """Moves all tensors in as many threads as torch has now, reading each live value from memory once for all tracks.

    With numbers as weights, float32 and float64 averages are equal to torch's to the bit. Tensors that have gaps, or
    that are laid out otherwise than their averages, move as `make_scratch_kernel` moves them.
    It keeps views of the tensors: make another one when they get other storage.

    Args:
        tracks: the averages of each track, in the order of ``values``, all of one dtype.
        values: the live weights, of one dtype, on the CPU.
        finite: False where infinities may occur; see `lerp_`.
        rounding: of bfloat16 averages; None for to nearest.

    Memory: a table of 12 bytes for every 32768 elements, and one of 16 and more for every tensor.
    Raises: UnfitError when there is no C compiler that can do it, or such tensors cannot be moved.
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
                f"it moves tracks of one dtype on the CPU, among {[*C_TYPES]}; found {dtypes} that follow "
                f"{values[0].dtype} on {values[0].device}"
            )
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if not compiler:
            raise UnsupportedKernelError("there is no C compiler: install gcc or clang, or name one in CC")
        kernel = _compile(compiler, C_TYPES[values[0].dtype], C_TYPES[dtypes.pop()], *ROUNDING_MACROS[type(rounding)])
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
    def __call__(self, weights: Sequence[Weight], update_index: UpdateIndex = 0) -> None:
        """Move each track by its weight."""
        for index, weight in enumerate(weights):
            self._weights[index] = weight
        if self._tables:
            if list(map(Tensor.data_ptr, self._outputs)) != self._addresses:  # share_memory_() moves what others view
                self._set_tables()
            all_tables = (*self._tables, *self._noise, self._weights)
            addresses = [None if table is None else table.data_ptr() for table in all_tables]
            _run_in_threads(partial(self._kernel, *addresses, int(update_index), *self._settings), self._block_ranges)
            increment_version(self._outputs)
        self._strided_kernel(weights, update_index)

    def _set_tables(self) -> None:
        """Note where the tensors lie: tables hold addresses only."""
        self._addresses = list(map(Tensor.data_ptr, self._outputs))
        self._tables = make_address_tables(self._rows, block=BLOCK) if self._rows else None


@cache
def _compile(compiler: str, live: str, stored: str, *definitions: str) -> Callable[..., None] | UnsupportedKernelError:
    """The kernel for these types; or why there is none, so that a compiler which fails is not asked again."""
    wide = "double" if stored == "double" else "float"
    types = [f"LIVE={live}", f"STORED={stored}", f"WIDE={wide}", *["HALF"] * ("half" in (live, stored))]
    with TemporaryDirectory() as folder:
        library = Path(folder, "follow.so")
        command = [
            *compiler.split(),
            *COMPILER_FLAGS,
            *(f"-D{name}" for name in (*types, *definitions)),
            str(SOURCE),
            "-o",
            str(library),
            "-lm",
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            kernel = ctypes.CDLL(str(library)).lerp_tracks
        except (OSError, subprocess.CalledProcessError) as error:
            return UnsupportedKernelError(f"{' '.join(command)} failed: {getattr(error, 'stderr', error)}")
    kernel.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 7
    kernel.restype = None
    return kernel


def _block_ranges(address_tables: AddressTables, threads: int) -> list[tuple[int, int]]:
    """Runs of blocks with about as many elements each, one for each thread that has enough to do."""
    remaining = address_tables.sizes[address_tables.block_tensors] - address_tables.block_starts
    elements = remaining.clamp(max=BLOCK).cumsum(0)
    count = max(1, min(threads, int(elements[-1]) // MIN_THREAD_ELEMENTS))
    ends = [int(elements[-1]) * number // count for number in range(1, count + 1)]
    return [*pairwise([0, *(torch.searchsorted(elements, torch.tensor(ends, device="cpu")) + 1).tolist()])]


def _run_in_threads(run: Callable[[int, int], None], block_ranges: list[tuple[int, int]]) -> None:
    """Run all parts side by side, the first one here."""
    mine, *theirs = block_ranges
    others = [_submit(partial(run, *block_range), threads=len(theirs)) for block_range in theirs]
    run(*mine)
    for other in others:
        other.result()


def _submit(run: Callable[[], None], *, threads: int) -> Future[None]:
    try:
        return _pool(threads, os.getpid()).submit(run)
    except RuntimeError:  # the interpreter ends, and waits for the thread that is here
        run()
    done: Future[None] = Future()
    done.set_result(None)
    return done


@cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ema_dist")
