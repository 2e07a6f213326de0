"""In which dtype averages are kept, and how they are rounded to it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Stochastic:
    """A bfloat16 average goes up or down by chance, in proportion to what lies between: it is right on average.

    Plain rounding would lose every move smaller than half of what bfloat16 tells apart: at a decay above 0.998 all of
    them, unless the weight is farther away than the average is large. The chance hangs on the seed, the number of the
    update, and the place in the full tensor: replicas agree, and a run goes on the same after it was resumed, also on
    another number of ranks if they hold rows.

    Args:
        seed: not negative.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"the seed of Stochastic is a whole number, 0 or more, got {self.seed!r}")


@dataclass(frozen=True)
class Compensated:
    """A bfloat16 average has the 16 bits that it lacks beside it: together they are the float32 average, to the bit.

    Evaluation then gets the averages as they lie there, without a cast copy. Checkpoints and `ShardedEMA.gather` have
    float32 numbers. Beside weights that are not bfloat16 nothing would be gained: their averages are kept as
    ``dtype=None`` keeps them.
    """


@dataclass(frozen=True)
class Precision:
    """How the averages of one model are kept.

    Args:
        dtype: None for float32 where the live dtype is narrower, else the live dtype.
        rounding: of bfloat16 averages.

    Raises: ValueError when these do not go together. Warns of a dtype in which averages may stand still.
    """

    dtype: torch.dtype | None = None
    rounding: Stochastic | Compensated = field(default_factory=Stochastic)

    def __post_init__(self) -> None:
        if not isinstance(self.rounding, Stochastic | Compensated):
            raise ValueError(f"rounding is Stochastic(seed=...) or Compensated(), got {self.rounding!r}")
        if isinstance(self.rounding, Compensated) and self.dtype != torch.bfloat16:
            raise ValueError(f"rounding=Compensated() is for dtype=torch.bfloat16, got dtype={self.dtype}")
        if self.dtype is None:
            return
        if not self.dtype.is_floating_point or self.dtype.itemsize < torch.bfloat16.itemsize:
            raise ValueError(f"averages are floating-point, of 16 bits or more, got dtype={self.dtype}")
        if self.dtype == torch.float16:
            warnings.warn(
                "averages in torch.float16 are rounded to nearest: moves below 1/4096 of them are lost, and with a "
                "decay close to 1 they stand still; use dtype=torch.bfloat16, which is rounded by chance, or None",
                stacklevel=4,
            )

    @property
    def buffer_precision(self) -> Precision:
        """Those of buffers are never taken apart: what a swap finds written to them would get the rest of another."""
        return Precision() if isinstance(self.rounding, Compensated) else self

    def storage_dtype(self, live_dtype: torch.dtype) -> torch.dtype:
        """The dtype of averages beside weights of dtype ``live_dtype``."""
        if live_dtype.is_complex:
            return torch.complex64 if self.dtype is None and live_dtype == torch.complex32 else live_dtype
        if self.dtype is not None and (isinstance(self.rounding, Stochastic) or self.has_residuals(live_dtype)):
            return self.dtype
        return torch.float32 if live_dtype.itemsize < torch.float32.itemsize else live_dtype

    def has_residuals(self, live_dtype: torch.dtype) -> bool:
        """Whether what averages lack is kept beside them."""
        return isinstance(self.rounding, Compensated) and live_dtype == self.dtype
