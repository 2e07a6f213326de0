"""Lists of tensors for the tests of kernels, and the averages expected of them in float64."""

from __future__ import annotations

import os

import torch
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Set by tests/kernels/test_triton.py, in a process of its own that tests only the Triton kernel."""

SHAPES = [(), (0, 3), (7, 5), (1, 2, 3), (129,)]


def sample_tensors(dtype: torch.dtype) -> list[Tensor]:
    """Scalars, empty tensors, odd sizes, a dense layout that is not row-major, and strides with gaps."""
    wide = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    wide += [torch.randn(4, 6, dtype=torch.float64).t(), torch.randn(6, 8, dtype=torch.float64)[:, ::2]]
    return [with_strides_of(tensor.to(dtype), tensor) for tensor in wide]


def with_strides_of(values: Tensor, strided: Tensor) -> Tensor:
    """A copy of `values` with the strides of `strided`, gaps included."""
    buffer = torch.zeros(strided.untyped_storage().nbytes() // strided.element_size(), dtype=values.dtype)
    return buffer.as_strided(strided.shape, strided.stride(), strided.storage_offset()).copy_(values)


def expected_average(average: Tensor, value: Tensor, weight: float) -> Tensor:
    """The oracle: one update in float64, or complex128."""
    wide = torch.complex128 if average.is_complex() else torch.float64
    return average.to(wide) * (1 - weight) + value.to(wide) * weight


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Equal within four units in the last place of the actual dtype."""
    for average, reference in zip(actual, expected, strict=True):
        eps = 4 * torch.finfo(average.dtype).eps
        torch.testing.assert_close(average.to(reference.dtype), reference, rtol=eps, atol=eps)
