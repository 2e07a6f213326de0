"""Arithmetic that works on both numbers and 0-d tensors.

Python's ``min``, ``math.cos`` and ``if`` wait for the device when given a tensor. Operators (``+``, ``/``, ``**``) do
not, and keep float64. On MPS, which has no float64, tensors are float32.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float | Tensor
"""A Python number, or a 0-d tensor of `widest_float` whose value only its device knows."""

Truth: TypeAlias = bool | Tensor
"""A Python boolean, or a 0-d boolean tensor."""


def minimum(value: Number, bound: float) -> Number:
    """The smaller of ``value`` and ``bound``."""
    return value.clamp(max=bound) if isinstance(value, Tensor) else min(value, bound)


def maximum(value: Number, bound: float) -> Number:
    """The larger of ``value`` and ``bound``."""
    return value.clamp(min=bound) if isinstance(value, Tensor) else max(value, bound)


def cosine(value: Number) -> Number:
    """The cosine of ``value``."""
    return value.cos() if isinstance(value, Tensor) else math.cos(value)


def exponential(value: Number) -> Number:
    """The exponential function of ``value``."""
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def power_of_two(exponent: Number) -> Number:
    """Two to the power of ``exponent``."""
    return exponent.exp2() if isinstance(exponent, Tensor) else 2.0**exponent


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on MPS, which does not support float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def as_float64(count: Number) -> Number:
    """Converts an integer tensor to float64, because its quotient would have the default dtype, maybe bfloat16."""
    return count.to(widest_float(count.device)) if isinstance(count, Tensor) else count


def where(condition: Truth, if_true: Number, if_false: Number) -> Number:
    """``if_true`` or ``if_false``; a NaN or infinity in the other one has no effect."""
    if not isinstance(condition, Tensor):
        return if_true if condition else if_false
    # torch.where with a Python number copies the number to the device, which waits. With two numbers it returns the
    # default dtype, which may be bfloat16.
    if not isinstance(if_true, Tensor):
        if isinstance(if_false, Tensor):
            return if_false.masked_fill(condition, if_true)
        dtype = widest_float(condition.device) if isinstance(if_true, float) else torch.int64
        if_true = torch.full_like(condition, if_true, dtype=dtype)
    if not isinstance(if_false, Tensor):
        return if_true.masked_fill(condition.logical_not(), if_false)
    return torch.where(condition, if_true, if_false)
