"""Casts of weights that keep every value what it is: finite ones stay finite."""

from __future__ import annotations

import torch
from torch import Tensor

from ema_dist.checkpoint.errors import CheckpointError


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, or itself.

    Raises: CheckpointError when a finite value is beyond the range of a floating ``dtype``, where it would become
        infinite, NaN, or the largest one there is.
    """
    if tensor.is_floating_point() and (limit := torch.finfo(dtype).max) < torch.finfo(tensor.dtype).max:
        largest = _largest_finite(tensor)
        if largest > limit:
            raise CheckpointError(
                f"{name!r} holds {largest:.6g}, beyond the range of {dtype}, which ends at {limit:.6g}; "
                "choose a dtype of a wider range, such as bfloat16"
            )
    return tensor.to(dtype)


def upcast_float8(tensor: Tensor) -> Tensor:
    """A floating or complex tensor with the same values, in a dtype that torch calculates in."""
    return tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no arithmetic of its own


def _largest_finite(tensor: Tensor) -> float:
    """The largest absolute value that is finite; 0 where there is none."""
    wide = upcast_float8(tensor)
    if wide.numel() == 0:
        return 0.0
    low, high = wide.aminmax()
    largest = torch.maximum(-low, high)
    return largest.item() if largest.isfinite() else _largest_finite(wide[wide.isfinite()])
