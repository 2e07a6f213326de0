"""Rectangles and dimension orders of shards, for any shapes."""

from __future__ import annotations

from math import prod

import hypothesis.strategies as st
import torch
from hypothesis import given

from ema_dist.sharding.flat_shard import rectangles
from ema_dist.sharding.shard import flat_view, memory_order

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(SHAPES, st.data())
def test_rectangles_cover_a_run_exactly(shape: list[int], data: st.DataObject) -> None:
    """Every element of the run once, in order, and few blocks."""
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    full = torch.arange(prod(shape)).view(shape)
    elements: list[int] = []
    blocks = list(rectangles((start, stop), shape))
    for first, corner, sizes in blocks:
        block = full
        for dim, (offset, size) in enumerate(zip(corner, sizes, strict=True)):
            block = block.narrow(dim, offset, size)
        assert block.flatten()[0] == first
        elements += block.flatten().tolist()
    assert elements == list(range(start, stop))
    assert len(blocks) <= 2 * len(shape) - 1


@given(SHAPES, st.randoms(use_true_random=False))
def test_memory_order_of_dense_tensors(shape: list[int], random: object) -> None:
    """A permuted tensor is dense; a strided slice of it is not, unless nothing was left out."""
    dims = list(range(len(shape)))
    random.shuffle(dims)
    tensor = torch.arange(prod(shape)).view(shape).permute(dims)
    order = memory_order(tensor.shape, tensor.stride())
    assert order is not None
    assert torch.equal(flat_view(tensor), tensor.permute(order).reshape(-1))
    if tensor.shape[0] > 2:
        assert memory_order(tensor[::2].shape, tensor[::2].stride()) is None
