"""How averages become bfloat16 without losing the moves that are too small for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """Where the elements of a tensor lie: the same places get the same random bits, on any rank."""

    tensor: int
    """Which one it is: different for each tensor of a model, and the same in every run."""
    first: int = 0
    """The place of its first element in the full tensor, where that is cut."""


@dataclass(frozen=True)
class ByChance:
    """Up or down by chance, in proportion to what lies between two bfloat16: right on average.

    The random bits depend on the seed, the number of the update and of the track, and the place; see `noise`.

    Args:
        places: of each tensor; of tensors that are dense in another order than row-major, elements count in memory.
        seed: not negative.
    """

    places: Sequence[Place]
    seed: int = 0

    def of(self, tensors: Sequence[int]) -> ByChance:
        """The same for these tensors only."""
        return ByChance([self.places[tensor] for tensor in tensors], self.seed)


@dataclass(frozen=True)
class Remainders:
    """To nearest, and what that leaves is kept beside it: no bit of a float32 average is lost; see `split`.

    Args:
        tracks: int16 remainders of each track, in the order of its averages.
    """

    tracks: Sequence[list[Tensor]]

    def of(self, tensors: Sequence[int]) -> Remainders:
        """The same for these tensors only."""
        return Remainders([[track[tensor] for tensor in tensors] for track in self.tracks])


Rounding = ByChance | Remainders
