"""The dtype that averages are stored in, and how they are rounded to it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Stochastic:
    """Stochastic rounding of bfloat16 averages: up or down at random, so that the expected value is exact.

    Rounding to nearest would lose every change smaller than half the spacing of bfloat16 numbers: with a decay above
    0.998, every change, unless the live weight differs from the average by more than the average itself. The random
    bits depend on the seed, the number of the update, and the offset in the full tensor. So replicas agree, and a
    resumed run continues with the same bits, even on a different number of ranks if the tensors are sharded by rows.

    Args:
        seed: a non-negative integer.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"the seed of Stochastic must be an integer, 0 or more, got {self.seed!r}")


@dataclass(frozen=True)
class Compensated:
    """A bfloat16 average with a 16-bit residual: together they are bit-identical to the float32 average (hi/lo split).

    Evaluation uses the bfloat16 averages directly, without a cast copy. Checkpoints and `ShardedEMA.gather` contain
    float32 values. Only averages of bfloat16 weights are split; others are stored as with ``dtype=None``.
    """


@dataclass(frozen=True)
class Precision:
    """The dtype and the rounding of one model's averages.

    Args:
        dtype: dtype of the averages; None for float32 if the live dtype is narrower, else the live dtype.
        rounding: how bfloat16 averages are rounded.

    Raises: TypeError if ``dtype`` is not a dtype; ValueError for an unsupported dtype, or one that ``rounding`` does
        not support. Warns about a dtype in which averages may stop changing.
    """

    dtype: torch.dtype | None = None
    rounding: Stochastic | Compensated = field(default_factory=Stochastic)

    def __post_init__(self) -> None:
        if not isinstance(self.rounding, Stochastic | Compensated):
            raise ValueError(f"rounding must be Stochastic(seed=...) or Compensated(), got {self.rounding!r}")
        if isinstance(self.rounding, Compensated) and self.dtype != torch.bfloat16:
            raise ValueError(f"rounding=Compensated() requires dtype=torch.bfloat16, got dtype={self.dtype}")
        if self.dtype is None:
            return
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, such as torch.bfloat16, or None, got {self.dtype!r}")
        if not self.dtype.is_floating_point or self.dtype.itemsize < torch.bfloat16.itemsize:
            raise ValueError(f"dtype must be a floating-point dtype of 16 bits or more, got dtype={self.dtype}")
        if self.dtype == torch.float16:
            warnings.warn(
                "averages in torch.float16 are rounded to nearest: changes below 1/4096 of an average are lost, and "
                "with a decay close to 1 it does not change at all; use dtype=torch.bfloat16, which is rounded "
                "stochastically, or None",
                stacklevel=5,
            )

    @property
    def buffer_precision(self) -> Precision:
        """The precision of buffers, which are never split: a value written in a swap would keep the old residual."""
        return Precision() if isinstance(self.rounding, Compensated) else self

    def storage_dtype(self, live_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the averages of weights of ``live_dtype``."""
        if live_dtype.is_complex:
            return torch.complex64 if self.dtype is None and live_dtype == torch.complex32 else live_dtype
        if self.dtype is not None and (isinstance(self.rounding, Stochastic) or self.has_residuals(live_dtype)):
            return self.dtype
        return torch.float32 if live_dtype.itemsize < torch.float32.itemsize else live_dtype

    def has_residuals(self, live_dtype: torch.dtype) -> bool:
        """Whether averages of weights of ``live_dtype`` are stored as a bfloat16 and a residual."""
        return isinstance(self.rounding, Compensated) and live_dtype == self.dtype
