"""Lists of tensors for the tests of kernels, and what following them gives in float64."""

from __future__ import annotations

import os

import torch
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""tests/kernels/test_triton.py asks for it, in a process of its own: then it is only Triton's turn."""

SHAPES = [(), (0, 3), (7, 5), (1, 2, 3), (129,)]


def sample_tensors(dtype: torch.dtype) -> list[Tensor]:
    """Of no dimension, of no elements, of odd sizes, dense in another order than row-major, and with gaps."""
    wide = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    wide += [torch.randn(4, 6, dtype=torch.float64).t(), torch.randn(6, 8, dtype=torch.float64)[:, ::2]]
    return [with_strides_of(tensor.to(dtype), tensor) for tensor in wide]


def with_strides_of(values: Tensor, strided: Tensor) -> Tensor:
    """The values in a tensor of the other's strides, gaps included."""
    buffer = torch.zeros(strided.untyped_storage().nbytes() // strided.element_size(), dtype=values.dtype)
    return buffer.as_strided(strided.shape, strided.stride(), strided.storage_offset()).copy_(values)


def expected_average(average: Tensor, value: Tensor, weight: float) -> Tensor:
    """The oracle: in float64, or complex128."""
    wide = torch.complex128 if average.is_complex() else torch.float64
    return average.to(wide) * (1 - weight) + value.to(wide) * weight


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Within four units in the last place of what was found."""
    for ours, reference in zip(found, expected, strict=True):
        eps = 4 * torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.to(reference.dtype), reference, rtol=eps, atol=eps)
