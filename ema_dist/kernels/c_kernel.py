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

from ema_dist.kernels.follow import UnfitError
from ema_dist.kernels.in_chunks import in_chunks_only
from ema_dist.kernels.lerp import Update, Weight
from ema_dist.kernels.random_bits import noise_tables
from ema_dist.kernels.rounding import ByChance, Remainders, Rounding
from ema_dist.kernels.tables import Tables, flat_rows, tables

BLOCK = 2**15
"""Elements that all tracks move by before the next ones: they stay in the second cache, and are enough for memory to be
read ahead."""

LEAST_ELEMENTS = 2**18
"""Of a thread: fewer take less time than handing them over."""

SOURCE = Path(__file__).with_name("c_kernel.c")
OPTIONS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
NAMES = {torch.float32: "float", torch.float64: "double", torch.float16: "half", torch.bfloat16: "bfloat"}
DEFINITIONS = {type(None): (), ByChance: ("BY_CHANCE",), Remainders: ("REMAINDERS",)}


class Compiled:
    """Moves all tensors in as many threads as torch has now, reading each live value from memory once for all tracks.

    With numbers as weights, float32 and float64 averages are equal to torch's to the bit. Tensors that have gaps, or
    that are laid out otherwise than their averages, move as `in_chunks` moves them.
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
        if values[0].device.type != "cpu" or len(dtypes) > 1 or not {values[0].dtype, *dtypes} <= NAMES.keys():
            raise UnfitError(
                f"it moves tracks of one dtype on the CPU, among {[*NAMES]}; found {dtypes} that follow "
                f"{values[0].dtype} on {values[0].device}"
            )
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if not compiler:
            raise UnfitError("there is no C compiler: install gcc or clang, or name one in CC")
        kernel = _compiled(compiler, NAMES[values[0].dtype], NAMES[dtypes.pop()], *DEFINITIONS[type(rounding)])
        if isinstance(kernel, UnfitError):
            raise kernel
        self._kernel = kernel
        remainders = rounding.tracks if isinstance(rounding, Remainders) else ()
        self._rows, flat, others = flat_rows(values, *tracks, *remainders)
        self._others = in_chunks_only(others, tracks, values, finite=finite, rounding=rounding)
        self._written = [tensor for _, *written in self._rows for tensor in written]
        self._set_tables()
        self._parts = _parts(self._tables, torch.get_num_threads()) if self._tables else []
        self._noise = (None, None, None)
        if isinstance(rounding, ByChance):
            self._noise = noise_tables(rounding.of(flat), tracks=len(tracks), device=values[0].device)
        self._weights = torch.zeros(len(tracks), dtype=torch.float64, device="cpu")
        self._settings = (len(self._rows), len(tracks), finite, BLOCK)

    @torch.no_grad()
    def __call__(self, weights: Sequence[Weight], update: Update = 0) -> None:
        """Move each track by its weight."""
        for index, weight in enumerate(weights):
            self._weights[index] = weight
        if self._tables:
            if list(map(Tensor.data_ptr, self._written)) != self._addresses:  # share_memory_() moves what others view
                self._set_tables()
            found = (*self._tables, *self._noise, self._weights)
            addresses = [None if table is None else table.data_ptr() for table in found]
            _in_threads(partial(self._kernel, *addresses, int(update), *self._settings), self._parts)
            increment_version(self._written)
        self._others(weights, update)

    def _set_tables(self) -> None:
        """Note where the tensors lie: tables hold addresses only."""
        self._addresses = list(map(Tensor.data_ptr, self._written))
        self._tables = tables(self._rows, block=BLOCK) if self._rows else None


@cache
def _compiled(compiler: str, live: str, stored: str, *definitions: str) -> Callable[..., None] | UnfitError:
    """The kernel for these types; or why there is none, so that a compiler which fails is not asked again."""
    wide = "double" if stored == "double" else "float"
    types = [f"LIVE={live}", f"STORED={stored}", f"WIDE={wide}", *["HALF"] * ("half" in (live, stored))]
    with TemporaryDirectory() as folder:
        library = Path(folder, "follow.so")
        command = [
            *compiler.split(),
            *OPTIONS,
            *(f"-D{name}" for name in (*types, *definitions)),
            str(SOURCE),
            "-o",
            str(library),
            "-lm",
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            kernel = ctypes.CDLL(str(library)).follow
        except (OSError, subprocess.CalledProcessError) as error:
            return UnfitError(f"{' '.join(command)} failed: {getattr(error, 'stderr', error)}")
    kernel.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 7
    kernel.restype = None
    return kernel


def _parts(found: Tables, threads: int) -> list[tuple[int, int]]:
    """Runs of blocks with about as many elements each, one for each thread that has enough to do."""
    rests = found.sizes[found.block_tensors] - found.block_starts
    elements = rests.clamp(max=BLOCK).cumsum(0)
    count = max(1, min(threads, int(elements[-1]) // LEAST_ELEMENTS))
    ends = [int(elements[-1]) * part // count for part in range(1, count + 1)]
    return [*pairwise([0, *(torch.searchsorted(elements, torch.tensor(ends, device="cpu")) + 1).tolist()])]


def _in_threads(run: Callable[[int, int], None], parts: list[tuple[int, int]]) -> None:
    """Run all parts side by side, the first one here."""
    mine, *theirs = parts
    others = [_begun(partial(run, *part), threads=len(theirs)) for part in theirs]
    run(*mine)
    for other in others:
        other.result()


def _begun(run: Callable[[], None], *, threads: int) -> Future[None]:
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
