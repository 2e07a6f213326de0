"""Arithmetic on lists of plain local tensors: no names, no modules, no collectives.

The tensors of one list share a device and a dtype; lists are paired by position and pairs have equal shapes.
"""

from ema_dist.kernels.checksums import checksum
from ema_dist.kernels.compensated import joined, split
from ema_dist.kernels.exchange import exchange_
from ema_dist.kernels.follow import Follow, follow_, lerp_
from ema_dist.kernels.host_copy import HostCopy, ToHost
from ema_dist.kernels.lerp import Update, Weight
from ema_dist.kernels.lists import alike, chunks, paired
from ema_dist.kernels.rounding import ByChance, Place, Remainders, Rounding
from ema_dist.kernels.scratch import CPU_SCRATCH_BYTES, DEVICE_SCRATCH_BYTES, make_scratch, views
from ema_dist.kernels.selection import KERNELS, Agree, bind

__all__ = [
    "CPU_SCRATCH_BYTES",
    "DEVICE_SCRATCH_BYTES",
    "KERNELS",
    "Agree",
    "ByChance",
    "Follow",
    "HostCopy",
    "Place",
    "Remainders",
    "Rounding",
    "ToHost",
    "Update",
    "Weight",
    "alike",
    "bind",
    "checksum",
    "chunks",
    "exchange_",
    "follow_",
    "joined",
    "lerp_",
    "make_scratch",
    "paired",
    "split",
    "views",
]
