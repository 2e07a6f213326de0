"""Arithmetic on lists of plain local tensors: lerps, swaps, rounding, checksums and copies to the host.

Code that knows names, modules, ranks, collectives or schedules does not belong here: kernels take tensors and
numbers. An exchange, and an update that is given a `WriteLog`, can be continued after an interruption. Modules here
import torch, the standard library, each other and `signals`, and nothing else of `ema_dist`.

The tensors of one list have the same device and dtype. Lists correspond by position, and corresponding tensors have
equal shapes.
"""

from ema_dist.kernels.bus_copy import copy_pairs, copy_to_host
from ema_dist.kernels.c_kernel import compiler_problem
from ema_dist.kernels.checksums import checksum
from ema_dist.kernels.compensated_kernel import recombine, split_hi_lo
from ema_dist.kernels.exchange import Exchange
from ema_dist.kernels.host_copy import HostBuffer, HostCopier
from ema_dist.kernels.kernel import Kernel, UpdateIndex, Weight
from ema_dist.kernels.lerp import lerp_, lerp_tracks_
from ema_dist.kernels.lists import chunks, group_by_dtype, group_pairs
from ema_dist.kernels.rounding import CompensatedRounding, Rounding, StochasticRounding, TensorOffset
from ema_dist.kernels.scratch import CPU_SCRATCH_BYTES, DEVICE_SCRATCH_BYTES, max_scratch_bytes
from ema_dist.kernels.selection import AUTO, KERNELS, Agree, make_kernel
from ema_dist.kernels.write_log import WriteLog

__all__ = [
    "AUTO",
    "CPU_SCRATCH_BYTES",
    "DEVICE_SCRATCH_BYTES",
    "KERNELS",
    "Agree",
    "CompensatedRounding",
    "Exchange",
    "HostBuffer",
    "HostCopier",
    "Kernel",
    "Rounding",
    "StochasticRounding",
    "TensorOffset",
    "UpdateIndex",
    "Weight",
    "WriteLog",
    "checksum",
    "chunks",
    "compiler_problem",
    "copy_pairs",
    "copy_to_host",
    "group_by_dtype",
    "group_pairs",
    "lerp_",
    "lerp_tracks_",
    "make_kernel",
    "max_scratch_bytes",
    "recombine",
    "split_hi_lo",
]
