"""Dtype casts of weights that refuse to turn a finite value into an infinite one."""

from __future__ import annotations

import torch
from torch import Tensor

from ema_dist.checkpoint.errors import CheckpointError


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in ``dtype``, or itself if it has that dtype.

    Raises: CheckpointError when a finite value is beyond the range of a floating ``dtype``: the cast would make it
        infinite, NaN, or the largest value of the range.
    """
    if tensor.is_floating_point() and (limit := torch.finfo(dtype).max) < torch.finfo(tensor.dtype).max:
        largest = _largest_finite(tensor)
        if largest > limit:
            raise CheckpointError(
                f"{name!r} holds {largest:.6g}, but the largest value of {dtype} is {limit:.6g}: "
                "choose a dtype with a wider range, such as bfloat16"
            )
    return tensor.to(dtype)


def upcast_float8(tensor: Tensor) -> Tensor:
    """Return the tensor, in float32 if it is float8, which has no arithmetic in torch."""
    return tensor.float() if tensor.itemsize == 1 else tensor


def _largest_finite(tensor: Tensor) -> float:
    """The largest finite absolute value; 0 if there is none."""
    wide = upcast_float8(tensor)
    if wide.numel() == 0:
        return 0.0
    low, high = wide.aminmax()
    largest = torch.maximum(-low, high)
    return largest.item() if largest.isfinite() else _largest_finite(wide[wide.isfinite()])
