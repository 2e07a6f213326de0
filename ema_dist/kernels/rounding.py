"""How averages become bfloat16 without losing the moves that are too small for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class TensorOffset(NamedTuple):
    """Where the elements of a tensor lie: the same places get the same random bits, on any rank."""

    tensor_id: int
    """Which one it is: different for each tensor of a model, and the same in every run."""
    offset: int = 0
    """The place of its first element in the full tensor, where that is cut."""


@dataclass(frozen=True)
class StochasticRounding:
    """Up or down by chance, in proportion to what lies between two bfloat16: right on average.

    The random bits depend on the seed, the number of the update and of the track, and the place; see `random_bits`.

    Args:
        tensor_offsets: of each tensor; of tensors that are dense in another order than row-major, elements count in memory.
        seed: not negative.
    """

    tensor_offsets: Sequence[TensorOffset]
    seed: int = 0

    def subset(self, indices: Sequence[int]) -> StochasticRounding:
        """The same for these tensors only."""
        return StochasticRounding([self.tensor_offsets[index] for index in indices], self.seed)


@dataclass(frozen=True)
class CompensatedRounding:
    """To nearest, and what that leaves is kept beside it: no bit of a float32 average is lost; see `split_hi_lo`.

    Args:
        residuals: int16, those of each track, in the order of its averages.
    """

    residuals: Sequence[list[Tensor]]

    def subset(self, indices: Sequence[int]) -> CompensatedRounding:
        """The same for these tensors only."""
        return CompensatedRounding([[track[index] for index in indices] for track in self.residuals])


Rounding = StochasticRounding | CompensatedRounding
