"""All tensors and tracks in one call of a kernel that the C compiler of this machine makes, within a second."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ema_dist.kernels.follow import UnfitError
from ema_dist.kernels.move import Weight
from ema_dist.kernels.tables import flat_rows, tables

BLOCK = 4096
"""Elements that all tracks move by before the next ones: they stay in the first cache."""

LEAST_BLOCKS = 64
"""Of a thread: fewer take less time than handing them over."""

SOURCE = Path(__file__).with_name("follow.c")
OPTIONS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
NAMES = {torch.float32: "float", torch.float64: "double", torch.float16: "half", torch.bfloat16: "bfloat"}


class Compiled:
    """Moves all tensors in as many threads as torch has, reading each live value from memory once for all tracks.

    What it makes of finite float32 and float64 is what torch makes of them, to the bit. Tensors that have gaps, or that
    are laid out otherwise than their averages, move as `InChunks` moves them.
    It keeps the tensors' addresses: make another one when they move to other storage.

    Args:
        tracks: the averages of each track, in the order of ``values``, all of one dtype.
        values: the live weights, of one dtype, on the CPU.
        finite: False where infinities may occur; see `lerp_`.

    Memory: a table of 12 bytes for every 4096 elements, and one of 16 and more for every tensor.
    Raises: UnfitError when there is no C compiler that can do it, or such tensors cannot be moved.
    """

    name = "compiled"

    def __init__(self, tracks: Sequence[list[Tensor]], values: list[Tensor], *, finite: bool = True) -> None:
        dtypes = {track[0].dtype for track in tracks}
        if values[0].device.type != "cpu" or len(dtypes) > 1 or not {values[0].dtype, *dtypes} <= NAMES.keys():
            raise UnfitError(
                f"it moves tracks of one dtype on the CPU, among {[*NAMES]}; found {dtypes} that follow "
                f"{values[0].dtype} on {values[0].device}"
            )
        self._kernel = _compiled(NAMES[values[0].dtype], NAMES[dtypes.pop()])
        self._rows, self._others = flat_rows(tracks, values, finite=finite)  # whose addresses the tables hold
        self._tables = tables(self._rows, block=BLOCK) if self._rows else ()
        self._settings = (len(self._rows), len(tracks), finite, BLOCK)
        self._weights = torch.zeros(len(tracks), dtype=torch.float64)

    @torch.no_grad()
    def __call__(self, weights: Sequence[Weight], update: int = 0) -> None:  # noqa: ARG002
        """Move each track by its weight."""
        for index, weight in enumerate(weights):
            self._weights[index] = weight
        if self._tables:
            _in_threads(self._run, len(self._tables[-1]))
        for other in self._others:
            other(weights)

    def _run(self, first: int, last: int) -> None:
        addresses = [table.data_ptr() for table in (*self._tables, self._weights)]
        self._kernel(*addresses, *self._settings, first, last)


@cache
def _compiled(live: str, stored: str) -> Callable[..., None]:
    """The kernel for these types."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise UnfitError("there is no C compiler: install gcc or clang, or name one in CC")
    wide = "double" if stored == "double" else "float"
    definitions = [f"-DLIVE={live}", f"-DSTORED={stored}", f"-DWIDE={wide}", *["-DHALF"] * ("half" in (live, stored))]
    with TemporaryDirectory() as folder:
        library = Path(folder, "follow.so")
        command = [compiler, *OPTIONS, *definitions, str(SOURCE), "-o", str(library), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UnfitError(f"{' '.join(command)} failed: {getattr(error, 'stderr', error)}") from error
        kernel = ctypes.CDLL(str(library)).follow
    kernel.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 6
    kernel.restype = None
    return kernel


def _in_threads(run: Callable[[int, int], None], blocks: int) -> None:
    """Run all blocks, in parts that torch's number of threads takes side by side."""
    threads = max(1, min(torch.get_num_threads(), blocks // LEAST_BLOCKS))
    mine, *theirs = pairwise(blocks * part // threads for part in range(threads + 1))
    others = [_pool(threads - 1, os.getpid()).submit(run, *part) for part in theirs]
    run(*mine)
    for other in others:
        other.result()


@cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ema_dist")
