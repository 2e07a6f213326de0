"""Two ways to round averages to bfloat16 without losing updates smaller than its precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class TensorOffset(NamedTuple):
    """The position of a local tensor in its full tensor, so that elements get the same random bits on any rank."""

    tensor_id: int
    """Different for each tensor of a model, and the same in every run."""
    offset: int = 0
    """The offset of the first local element in the full tensor."""


@dataclass(frozen=True)
class StochasticRounding:
    """Rounds up or down at random, with probabilities that make the result unbiased.

    The random bits depend on the seed, the update, the track and the element; see ``random_bits.py``.

    Args:
        tensor_offsets: one for each tensor. Elements are counted in memory order if the tensor is dense.
        seed: a non-negative integer.
    """

    tensor_offsets: Sequence[TensorOffset]
    seed: int = 0

    def subset(self, indices: Sequence[int]) -> StochasticRounding:
        """The same rounding of the tensors at ``indices``."""
        return StochasticRounding([self.tensor_offsets[index] for index in indices], self.seed)


@dataclass(frozen=True)
class CompensatedRounding:
    """Rounds to nearest and stores the residual: no bit of a float32 average is lost; see `split_hi_lo`.

    Args:
        residuals: int16 tensors of each track, in the order of its averages.
    """

    residuals: Sequence[list[Tensor]]

    def subset(self, indices: Sequence[int]) -> CompensatedRounding:
        """The same rounding of the tensors at ``indices``."""
        return CompensatedRounding([[track[index] for index in indices] for track in self.residuals])


Rounding = StochasticRounding | CompensatedRounding
