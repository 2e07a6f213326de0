"""Arithmetic on numbers and 0-d tensors alike.

Python's ``min``, ``math.cos`` or ``if`` of a tensor would wait for its device. Operators (``+``, ``/``, ``**``) work
for both as they are, and keep the float64 of a tensor beside a number.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float | Tensor
"""A Python number, or a 0-d float64 tensor that only its device knows."""

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


def as_number(count: Number) -> Number:
    """A count as laws take it: integer tensors become float64, because a division would give the default dtype."""
    return count.double() if isinstance(count, Tensor) else count


def where(condition: Truth, if_true: Number, if_false: Number) -> Number:
    """``if_true`` or ``if_false``; a NaN or infinity in the other one has no effect."""
    if not isinstance(condition, Tensor):
        return if_true if condition else if_false
    # Not torch.where of a number: it copies the number to the device and waits for that; and of two numbers it makes a
    # tensor of the default dtype, which may be bfloat16.
    if not isinstance(if_true, Tensor):
        if isinstance(if_false, Tensor):
            return if_false.masked_fill(condition, if_true)
        dtype = torch.float64 if isinstance(if_true, float) else torch.int64
        if_true = torch.full_like(condition, if_true, dtype=dtype)
    if not isinstance(if_false, Tensor):
        return if_true.masked_fill(condition.logical_not(), if_false)
    return torch.where(condition, if_true, if_false)
